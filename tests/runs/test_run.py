"""The whole job: it leaves what it promises, survives SIGKILL anywhere, and refuses bad input before it writes."""

import csv
import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from fake_clock import Clock
from killed_runs import assert_same_weights, kill_when_there
from read_pages import Read
from small_run import CONFIG, undisturbed

from depthfuse import Supernet, load, open_data
from depthfuse.checkpoint import load_json, load_tensors
from depthfuse.config import SearchConfig, to_yaml
from depthfuse.costs.table import CostTable
from depthfuse.data import DataConfig, DataError
from depthfuse.data.embedded import CLASS_NAMES
from depthfuse.errors import BudgetError, CheckpointError, ConfigError, CostError, SpecError
from depthfuse.runs import report
from depthfuse.runs.feeding import load_feeding
from depthfuse.runs.run import STAGES, Run, prune
from depthfuse.spec import SubnetSpec
from depthfuse.training.evaluation import top1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return undisturbed(CONFIG, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


def test_it_leaves_what_it_promises(finished):
    spec = SubnetSpec.load(finished / "subnet.json")
    assert len(spec.choices) == 2 and spec.source.name == "resnet18"
    rows = {row["net"]: row for row in load_json(finished / "results.json")["rows"]}
    assert set(rows) == {"baseline", "baseline accelerated", "pruned", "merged", "merged accelerated"}
    # of 2,000 images one may have two classes that are equal but for rounding
    top1 = [rows[name]["top1"] for name in ("merged", "pruned", "merged accelerated")]
    assert max(top1) - min(top1) <= 0.05 + 1e-6
    assert rows["baseline"]["top1"] == rows["baseline accelerated"]["top1"]
    assert all(row["latency_ms"] > 0 for row in rows.values())
    report = (finished / "report.md").read_text()
    assert all(name in report for name in rows) and all(choice.block in report for choice in spec.choices)
    page = Read((finished / "report.html").read_text())
    known = {section["id"] for section in page.all("section")}
    assert known == {"results", "front", "net", "training", "operations", "checks", "reproduce", "machine"}
    assert any(element["text"] == "resnet18" for element in page.all("h1"))
    for plot in ("comparison", "training", "blocks"):
        assert (finished / "plots" / f"{plot}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    stages = [row["stage"] for row in csv.DictReader((finished / "metrics.csv").open())]
    assert list(dict.fromkeys(stages)) == ["baseline", "supernet", "finetune"]
    assert not list(finished.glob("*.state")) and not list(finished.glob(".*"))
    feeding = load_feeding(finished)
    assert feeding["classes"] == list(CLASS_NAMES) and feeding["input_size"] == [1, 28, 28]
    assert (feeding["mean"], feeding["std"]) == ([0.2863], [0.3526])


def test_load_rebuilds_the_model_in_a_fresh_process(finished):
    code = (
        "import sys, torch, depthfuse\n"
        "net = depthfuse.load(sys.argv[1])\n"
        "torch.manual_seed(0)\n"
        "print(type(net).__name__, net(torch.randn(2, 1, 28, 28)).double().sum().item())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, finished], capture_output=True, text=True, check=True
    ).stdout
    name, value = out.split()
    net = load(finished)
    torch.manual_seed(0)
    assert name == "ResNet" and not net.training
    with torch.no_grad():
        assert float(value) == pytest.approx(net(torch.randn(2, 1, 28, 28)).double().sum().item(), rel=1e-5)
    rows = load_json(finished / "results.json")["rows"]
    data = open_data(CONFIG.data, num_classes=10, in_chans=1)
    assert top1(net, data.val_loader()) == next(row["top1"] for row in rows if row["net"] == "merged")


def test_a_finished_run_is_not_repeated(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*.safetensors")}
    prune(dataclasses.replace(CONFIG, out=finished))
    assert {p: p.stat().st_mtime_ns for p in finished.glob("*.safetensors")} == before


def test_a_kill_before_a_checkpoint_is_deleted_leaves_none(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for stage in ("baseline", "supernet", "finetune"):
        (out / f"{stage}.state").write_bytes(b"written before the artefact")
    prune(dataclasses.replace(CONFIG, out=out))
    assert not list(out.glob("*.state"))


# What must be on the disk when the process is killed: a moment inside each stage.
MOMENTS = {
    "baseline": "baseline.state",
    "supernet": "supernet.state",
    "search": "search.jsonl",
    "finetune": "finetune.state",
    "merge": "finetune.safetensors",
    "compare": "merged.safetensors",
}


def test_sigkill_in_each_stage_changes_nothing(finished, tmp_path):
    """Killed in each stage and started again: the same spec and the same weights, bit for bit."""
    out, config = tmp_path / "run", tmp_path / "config.yaml"
    # the same latency table in both: two measurements never agree to the last digit
    latency = dataclasses.replace(CONFIG.latency, table=finished / "latency.json")
    config.write_text(to_yaml(dataclasses.replace(CONFIG, latency=latency)))
    command = [sys.executable, "-m", "depthfuse.cli", "prune", "--config", config, "--out", out]
    assert list(MOMENTS) == list(STAGES)
    for moment in MOMENTS.values():
        kill_when_there(command, out / moment)
        assert not (out / "results.json").exists()
    prune(dataclasses.replace(CONFIG, latency=latency, out=out))
    assert (out / "subnet.json").read_text() == (finished / "subnet.json").read_text()
    assert_same_weights(out, finished, ("baseline", "supernet", "finetune", "merged"))


def refused(tmp_path, error, message, until="compare", **changes):
    out = tmp_path / "run"
    with pytest.raises(error, match=message):
        prune(dataclasses.replace(CONFIG, out=out, **changes), until)
    assert not out.exists() or not list(out.glob("*.tmp"))
    return out


def test_bad_models_are_refused_before_anything_is_written(tmp_path):
    out = refused(
        tmp_path, SpecError, "timm has no model 'resnet1888'; similar names: .*resnet18", model="resnet1888"
    )
    assert not out.exists()
    refused(tmp_path, SpecError, "no block that can be pruned", model="convnextv2_atto", model_kwargs=())
    refused(tmp_path, SpecError, "argument 'colour' is refused, .*channels", model_kwargs=("colour=1",))
    refused(tmp_path, SpecError, "timm refused the arguments", model_kwargs=("embed_dim=8",))
    refused(tmp_path, ConfigError, "name=value", model_kwargs=("colour",))
    refused(
        tmp_path,
        ConfigError,
        "takes images of 224x224 pixels, the data gives 28",
        model="deit_tiny_patch16_224",
        model_kwargs=(),
        data=DataConfig(img_size=28),
    )
    assert not out.exists()


def test_a_missing_budget_is_noticed_before_any_training(tmp_path):
    out = refused(tmp_path, BudgetError, r"exactly one budget: .* got none", search=SearchConfig())
    refused(
        tmp_path,
        BudgetError,
        r"got blocks=1, speedup=1.2: several",
        search=SearchConfig(blocks=1, speedup=1.2),
    )
    assert not out.exists()


def test_bad_data_is_refused_before_anything_is_written(tmp_path):
    out = refused(tmp_path, DataError, "nowhere", data=DataConfig(data=str(tmp_path / "nowhere")))
    refused(tmp_path, DataError, "has 10", model_kwargs=("num_classes=7", "in_chans=1"))
    assert not out.exists()


def test_infeasible_budgets_are_refused_before_the_supernet_is_trained(tmp_path, finished):
    shutil.copytree(
        finished, tmp_path / "run", ignore=shutil.ignore_patterns("s*", "config.yaml", "f*", "m*", "r*")
    )
    search = dataclasses.replace(CONFIG.search, blocks=None, speedup=1000.0)
    out = refused(tmp_path, BudgetError, r"the fastest reachable takes", search=search)
    assert not (out / "supernet.state").exists()


def test_a_missed_budget_is_said(finished, tmp_path, caplog):
    """The table promised a thousandfold; what was measured in the end is what counts."""
    out = tmp_path / "run"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("results.json", "config.yaml"))
    search = dataclasses.replace(CONFIG.search, blocks=None, speedup=1000.0)
    prune(dataclasses.replace(CONFIG, out=out, search=search))
    results = load_json(out / "results.json")
    budget = results["budget"]
    fast = next(row for row in results["rows"] if row["net"] == "merged accelerated")
    assert budget == {
        "name": "speedup",
        "unit": "x",
        "wanted": 1000.0,
        "reached": fast["speedup"],
        "met": False,
    }
    missed = report.budget_missed(results)
    assert missed.startswith("the budget was missed: search.speedup=1000 was asked for, ")
    assert missed in [record.message.partition(";")[0] for record in caplog.records]
    assert missed[1:] in (out / "report.md").read_text()
    assert ["budget (MISSED)", "", "", "", "", ">= 1000.00x"] in report.comparison_rows(results)
    first = load_json(finished / "results.json")
    assert first["budget"] == {"name": "blocks", "unit": "blocks", "wanted": 2, "reached": 2, "met": True}
    assert report.budget_missed(first) is None and first["noisy_latencies"] == []


def latencies(config, out, **changes):
    """The table that a run plans with, without training anything."""
    run = Run(
        dataclasses.replace(config, out=out, latency=dataclasses.replace(config.latency, **changes), seed=1)
    )
    return run.latency(Supernet(run.build()).eval())


def test_foreign_latency_tables_are_refused_unless_asked_for(finished, tmp_path):
    own = CostTable.load(finished / "latency.json")
    assert latencies(CONFIG, tmp_path / "own", table=finished / "latency.json") == own
    foreign = dataclasses.replace(own, conditions={**own.conditions, "device": "a toaster", "threads": 99})
    foreign.save(tmp_path / "foreign.json")
    with pytest.raises(CostError, match=r"foreign.json .*device 'a toaster' there.*threads 99 there"):
        latencies(CONFIG, tmp_path / "run", table=tmp_path / "foreign.json")
    assert not (tmp_path / "run" / "latency.json").exists()
    flagged = latencies(CONFIG, tmp_path / "run2", table=tmp_path / "foreign.json", foreign_table=True)
    assert flagged == foreign == CostTable.load(tmp_path / "run2" / "latency.json")
    with pytest.raises(CostError, match="dtype 'float32' there, 'float16' here"):
        latencies(CONFIG, tmp_path / "run3", table=finished / "latency.json", dtype="fp16")
    nonsense = {path: dict.fromkeys(names, own.whole) for path, names in own.saved.items()}
    dataclasses.replace(own, saved=nonsense).save(tmp_path / "nonsense.json")
    with pytest.raises(CostError, match=r"nonsense.json cannot be true"):
        latencies(CONFIG, tmp_path / "run5", table=tmp_path / "nonsense.json")
    assert not (tmp_path / "run5" / "latency.json").exists()
    dataclasses.replace(own, unit="MACs").save(tmp_path / "macs.json")
    with pytest.raises(CostError, match="counts MACs"):
        latencies(CONFIG, tmp_path / "run4", table=tmp_path / "macs.json")


def test_a_latency_table_cut_short_is_completed(finished, tmp_path, clock):
    own = CostTable.load(finished / "latency.json")
    short = CostTable.load(finished / "latency.json")
    del short.saved["layer2.0"]["dense"]
    (tmp_path / "run").mkdir()
    short.save(tmp_path / "run" / "latency.json")
    table = latencies(CONFIG, tmp_path / "run")
    assert table == own and len(clock.measured) == 1
    # without its closing check it is not whole, either
    dataclasses.replace(own, floor=None).save(tmp_path / "run" / "latency.json")
    assert latencies(CONFIG, tmp_path / "run") == own
    assert len(clock.measured) == 1 and len(clock.closed) == 2


def test_a_run_for_another_device_says_that_its_latencies_are_predicted(finished, tmp_path):
    table = latencies(CONFIG, tmp_path / "run", device="mi100", dtype="fp16")
    assert table.conditions["predicted"] and table.conditions["device"] == "MI100"
    results = load_json(finished / "results.json")
    assert results["chosen_by"] == results["conditions"] and results["conditions"]["predicted"] is False
    assert "chosen by" not in report.markdown(results)
    text = report.markdown(results | {"chosen_by": table.conditions})
    assert "chosen by PREDICTED latencies" in text and "device MI100" in text


def test_another_configuration_in_the_same_folder_is_refused(finished):
    with pytest.raises(ConfigError, match=r"another configuration \(seed differ\)"):
        Run(dataclasses.replace(CONFIG, out=finished, seed=1))


def test_damaged_and_foreign_artefacts_are_named(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    merged = out / "merged.safetensors"
    whole = merged.read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        merged.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="merged.safetensors"):
            load(out)
    shutil.copy(finished / "baseline.safetensors", merged)
    with pytest.raises(CheckpointError, match="weights of another model"):
        load(out)
    merged.write_bytes(whole)
    document = json.loads((out / "subnet.json").read_text())
    document["choices"][0]["block"] = "layer9.0"
    (out / "subnet.json").write_text(json.dumps(document))
    with pytest.raises(SpecError, match=r"no prunable block layer9\.0"):
        load(out)
    (out / "subnet.json").write_text("{}")
    with pytest.raises(SpecError, match="expected a document of format"):
        load(out)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing")


def test_given_weights_become_the_baseline(finished, tmp_path):
    weights = finished / "baseline.safetensors"
    run = prune(dataclasses.replace(CONFIG, out=tmp_path / "run", weights=weights), until="baseline")
    got, wanted = load_tensors(run.dir / "baseline.safetensors")[0], load_tensors(weights)[0]
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(weights.read_bytes()[:-5])
    refused(tmp_path / "2", CheckpointError, "cannot read weights from", weights=foreign)
    refused(
        tmp_path / "3", CheckpointError, "weights of another model", weights=finished / "merged.safetensors"
    )


def test_a_search_without_a_budget_leaves_the_front_to_pick_from(finished, tmp_path):
    explored, picked = tmp_path / "explored", tmp_path / "picked"
    search = dataclasses.replace(CONFIG.search, blocks=None, strategy="greedy", front=3)
    latency = dataclasses.replace(CONFIG.latency, table=finished / "latency.json")
    config = dataclasses.replace(CONFIG, search=search, latency=latency, start_from=finished)
    prune(dataclasses.replace(config, out=explored), "search")
    assert (explored / "baseline.safetensors").read_bytes() == (
        finished / "baseline.safetensors"
    ).read_bytes()
    rows = list(csv.DictReader((explored / "front.csv").open()))
    assert rows and all(float(row["cost_ms"]) > 0 for row in rows)
    assert (explored / "plots" / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (explored / "subnet.json").exists()
    with pytest.raises(BudgetError, match="got none"):
        prune(dataclasses.replace(config, out=explored))
    scores = (explored / "search.jsonl").read_text()
    pick = dataclasses.replace(CONFIG.search, strategy="pick")  # two blocks: the finished run has scored some
    config = dataclasses.replace(config, search=pick, start_from=explored, out=picked)
    prune(config, "search")
    assert (picked / "search.jsonl").read_text() == scores
    assert len(SubnetSpec.load(picked / "subnet.json").choices) == 2


def test_starting_from_a_run_with_other_settings_is_refused(finished, tmp_path):
    out = refused(tmp_path, ConfigError, "cannot start from .*: seed differ", start_from=finished, seed=3)
    assert not (out / "config.yaml").exists()


def test_unknown_strategies_and_blocks_are_refused_before_any_training(finished, tmp_path):
    search = dataclasses.replace(CONFIG.search, strategy="luck")
    out = refused(tmp_path, BudgetError, "unknown search strategy 'luck'; known: evolution", search=search)
    search = dataclasses.replace(CONFIG.search, exclude=("layer9.9",))
    refused(tmp_path, BudgetError, "cannot exclude block 'layer9.9': this model has layer1.0", search=search)
    assert not list(out.glob("*.state"))


@pytest.mark.parametrize(
    "ablation",
    [
        {"supernet": dataclasses.replace(CONFIG.supernet, separate_norms=False)},
        {"supernet": dataclasses.replace(CONFIG.supernet, border_remedy=False)},
        {"finetune": dataclasses.replace(CONFIG.finetune, mixing="block", distill=0.0)},
        {"search": dataclasses.replace(CONFIG.search, calibration_images=0)},
    ],
    ids=["shared norms", "no border remedy", "block mixing", "no calibration"],
)
def test_ablations_run_to_the_end(finished, tmp_path, ablation):
    latency = dataclasses.replace(CONFIG.latency, table=finished / "latency.json")
    search = dataclasses.replace(CONFIG.search, exclude=("layer1.0=compact", "layer2.0=compact"))
    config = dataclasses.replace(CONFIG, **{"search": search, "latency": latency} | ablation)
    prune(dataclasses.replace(config, out=tmp_path), "merge")
    merged = load_json(tmp_path / "merge.json")
    wrong = max(block["border"] for block in merged["blocks"])
    if config.supernet.border_remedy:
        assert wrong <= 1e-10
    assert all(block["interior"] <= 1e-10 for block in merged["blocks"])


def test_a_stage_gives_what_is_read_from_its_artefact(tmp_path):
    """Just trained, weights lie in another memory format, and every later score would differ in its last digits."""
    run = Run(dataclasses.replace(CONFIG, out=tmp_path / "run"))
    x = torch.randn(2, 1, 28, 28)
    trained, read = run.baseline().eval(), run.baseline().eval()
    for ours, theirs in zip(trained.parameters(), read.parameters(), strict=True):
        assert ours.stride() == theirs.stride()
    with torch.no_grad():
        assert torch.equal(trained(x), read(x))
