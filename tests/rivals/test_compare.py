"""Methods are compared under equal conditions: each keeps the budget, and a stopped comparison goes on."""

import csv
import dataclasses
import importlib.util

import pytest
import torch
from fake_clock import Clock

import depthfuse.rivals.compare as compare_module
from depthfuse import load
from depthfuse.checkpoint import load_json
from depthfuse.cli import main
from depthfuse.config import (
    CompareConfig,
    FinetuneConfig,
    LatencyConfig,
    SearchConfig,
    SupernetConfig,
    TrainConfig,
)
from depthfuse.data import DataConfig
from depthfuse.devices import device_name
from depthfuse.errors import BudgetError, ConfigError, MethodError
from depthfuse.measuring.counting import count_parameters
from depthfuse.rivals.channels import prune_channels, ratio_within
from depthfuse.rivals.compare import compare, parse_budget
from depthfuse.rivals.compare_report import summarise, table_rows
from depthfuse.rivals.images import OnSmaller, size_within
from depthfuse.rivals.methods import METHODS
from depthfuse.runs.reopening import reopen
from depthfuse.training.evaluation import evaluate

CONTROLS = tuple(name for name, method in METHODS.items() if method.control)
CONFIG = CompareConfig(
    model="resnet18",
    model_kwargs=("channels=(8,12,16,24)", "layers=(2,2,1,1)", "in_chans=1"),
    data=DataConfig(max_train_images=240, batch_size=64, holdout=0.2),
    baseline=TrainConfig(epochs=1, lr=2e-3, warmup_epochs=0.0),
    supernet=SupernetConfig(epochs=1, warmup_epochs=0.0),
    search=SearchConfig(population=4, parents=2, generations=1, calibration_images=64, losing_merges=True),
    finetune=FinetuneConfig(epochs=2, warmup_epochs=0.0, lambda_share=0.5),
    latency=LatencyConfig(rounds=1),
    methods=tuple(name for name, method in METHODS.items() if not method.control),
    controls=CONTROLS,
    budgets=("macs=0.95",),
    seeds=(0, 1),
    cpu=True,
)
HAS_TORCH_PRUNING = importlib.util.find_spec("torch_pruning") is not None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    methods = tuple(m for m in CONFIG.methods if m != "channels" or HAS_TORCH_PRUNING)
    config = dataclasses.replace(CONFIG, out=out, methods=methods)
    with pytest.MonkeyPatch.context() as patch:  # which merges pay is not left to chance
        Clock().install(patch)
        compare(config)
    return config


def test_every_method_keeps_the_budget_and_is_reported(finished):
    results = load_json(finished.out / "results.json")
    assert len(results["trials"]) == len([*finished.methods, *CONTROLS]) * 2
    for trial in results["trials"]:
        whole = results["baseline"]["macs"]
        if trial["method"] == "longer":
            assert trial["macs"] == whole and trial["choices"] == {}
        else:
            assert trial["macs"] <= 0.95 * whole * (1 + 1e-6), trial["method"]
        assert trial["latency_ms"] > 0 and 0 < trial["top1"] < 100 and trial["seconds"] > 0
    by = {(t["method"], t["seed"]): t for t in results["trials"]}
    for seed in (0, 1):
        smaller = by["smaller-images", seed]
        assert smaller["choices"] == {} and smaller["image_size"] == 20  # of 28
        assert smaller["parameters"] == by["longer", seed]["parameters"]
        same = [by[name, seed]["choices"] for name in ("updp", "direct", "slab", "scratch")]
        assert all(choices == same[0] for choices in same)
        assert set(by["drop", seed]["choices"].values()) == {"drop"}
        fitted = [by[name, seed] for name in ("fit", "fit-direct", "fit-progressive", "fit-replacing")]
        assert all(trial["choices"] == fitted[0]["choices"] for trial in fitted)
        assert fitted[0]["seconds"] < min(trial["seconds"] for trial in fitted[1:])
    rows = list(csv.DictReader((finished.out / "results.csv").open()))
    assert len(rows) == len(results["trials"])
    report = (finished.out / "report.md").read_text()
    assert all(f"| {name} |" in report for name in [*finished.methods, *CONTROLS, "baseline"])
    page = (finished.out / "report.html").read_text()
    assert all(cell in page for row in table_rows(results) for cell in row)
    assert (finished.out / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(finished.out.rglob("*.state"))


def test_a_trial_is_a_folder_to_load(finished):
    folder = finished.out / "seed1" / "macs-0.95" / "drop"
    trial = load_json(folder / "trial.json")
    data = compare_module.Comparison(finished)._seed_run(1).data
    assert trial["choices"] and evaluate(load(folder), data.val_loader()).top1 == trial["top1"]
    assert reopen(folder)[0].num_classes == data.num_classes
    path = finished.out / "exported.pt2"
    assert main(["export", str(folder), "--to", "torch", "--out", str(path)]) == 0 and path.exists()


def test_a_budget_that_a_method_cannot_reach_is_said_and_stops_nobody(finished, tmp_path):
    (tmp_path / "latency.json").write_bytes((finished.out / "latency.json").read_bytes())
    search = dataclasses.replace(finished.search, exclude=("layer1.1=drop", "layer2.1=drop"))
    config = dataclasses.replace(
        finished,
        search=search,
        out=tmp_path,
        methods=("updp", "drop"),
        controls=("longer",),
        seeds=(0,),
        budgets=("macs=0.95",),
    )
    compare(config)
    results = load_json(tmp_path / "results.json")
    assert {t["method"] for t in results["trials"]} == {"updp", "longer"}
    (missing,) = results["unreachable"]
    assert missing["method"] == "drop" and "fastest reachable" in missing["unreachable"]
    assert "| macs=0.95 | drop | out of reach |" in (tmp_path / "report.md").read_text()


def test_what_is_done_is_not_repeated(finished, monkeypatch):
    monkeypatch.setattr(compare_module, "METHODS", {})  # nothing may run
    monkeypatch.setattr(compare_module, "_time", lambda calls, rounds: pytest.fail("measured twice"))
    comparison = compare_module.Comparison.__new__(compare_module.Comparison)
    vars(comparison).update(vars(compare_module.Comparison(finished)), methods=list(finished.methods))
    comparison.prepare()
    for seed in finished.seeds:
        comparison.train(seed)


def test_a_stopped_comparison_goes_on_to_the_same_weights(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, out=tmp_path, methods=("updp",), seeds=(0,))
    (tmp_path / "latency.json").write_bytes((finished.out / "latency.json").read_bytes())
    calls = []
    true_fit = compare_module.METHODS["updp"].run

    def stopped(trial):
        calls.append(trial)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return true_fit(trial)

    method = dataclasses.replace(METHODS["updp"], run=stopped)
    monkeypatch.setitem(compare_module.METHODS, "updp", method)
    with pytest.raises(KeyboardInterrupt):
        compare(config, "train")
    compare(config, "train")
    for name in ("updp", "scratch"):
        got, wanted = (
            load_json(base / "seed0" / "macs-0.95" / name / "trial.json") for base in (tmp_path, finished.out)
        )
        for key in ("top1", "loss", "choices", "macs"):
            assert got[key] == wanted[key], (name, key)


def test_finalists_are_trained_once_and_charged_to_each_that_takes_the_best(finished, tmp_path):
    (tmp_path / "latency.json").write_bytes((finished.out / "latency.json").read_bytes())
    search = dataclasses.replace(finished.search, finalists=2)
    methods = ("fit", "fit-direct", "fit-progressive", "updp")
    config = dataclasses.replace(
        finished, search=search, out=tmp_path, methods=methods, controls=(), seeds=(0,)
    )
    compare(config, "train")
    shared = tmp_path / "seed0" / "macs-0.95"
    trials = {name: load_json(shared / name / "trial.json") for name in methods}
    for name, known in (("fitted", "fit-direct"), ("all", "updp")):
        rows = load_json(shared / f"finalists_{name}.json")
        found = load_json(shared / f"subnet_{name}.json")
        assert [row["choices"] for row in rows] == found["finalists"] and len(rows) == 2
        best = min(rows, key=lambda row: row["divergence"])
        assert trials[known]["choices"] == best["choices"]
        assert trials[known]["seconds"] > sum(row["seconds"] for row in rows) + found["seconds"]
    assert trials["fit-progressive"]["choices"] == trials["fit-direct"]["choices"]
    assert trials["fit"]["choices"] == load_json(shared / "subnet_fitted.json")["choices"]
    assert not list(tmp_path.rglob("*.state"))


def test_what_no_budget_changes_is_trained_once(finished, tmp_path, monkeypatch):
    (tmp_path / "latency.json").write_bytes((finished.out / "latency.json").read_bytes())
    trained = []
    true_run = METHODS["longer"].run
    counted = dataclasses.replace(METHODS["longer"], run=lambda trial: trained.append(1) or true_run(trial))
    monkeypatch.setitem(compare_module.METHODS, "longer", counted)
    budgets = ("macs=0.95", "macs=0.9")
    changes = {"methods": ("updp",), "controls": ("longer",), "seeds": (0,), "budgets": budgets}
    compare(dataclasses.replace(finished, out=tmp_path, **changes))
    rows = [t for t in load_json(tmp_path / "results.json")["trials"] if t["method"] == "longer"]
    assert len(trained) == 1 and [row.pop("budget") for row in rows] == list(budgets)
    assert rows[0] == rows[1]


def test_what_was_predicted_for_another_device_is_told_from_what_was_measured(finished, tmp_path):
    latency = dataclasses.replace(finished.latency, device="mi100")
    changes = {"latency": latency, "methods": ("updp",), "controls": (), "seeds": (0,)}
    compare(dataclasses.replace(finished, out=tmp_path, **changes))
    results = load_json(tmp_path / "results.json")
    assert results["conditions"]["device"] == device_name(torch.device("cpu"))
    assert not results["conditions"]["predicted"] and results["chosen_by"]["device"] == "MI100"
    report = (tmp_path / "report.md").read_text()
    measured, chosen = report.index("Measured with:"), report.index("chosen by PREDICTED latencies")
    assert measured < chosen < report.index("MI100")
    assert results["conditions"] == load_json(finished.out / "results.json")["chosen_by"]


def test_seeds_may_be_trained_apart(finished, tmp_path):
    (tmp_path / "latency.json").write_bytes((finished.out / "latency.json").read_bytes())
    config = dataclasses.replace(finished, out=tmp_path, methods=("updp",), controls=())
    for seed in (1, 0):
        compare(dataclasses.replace(config, seeds=(seed,)), "train")
    compare(config)
    assert {row["seeds"] for row in summarise(load_json(tmp_path / "results.json"))} == {2}


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ConfigError, match="compared on classification only, not on detection"):
        compare(dataclasses.replace(CONFIG, task="detection", out=tmp_path / "out"))
    with pytest.raises(MethodError, match="unknown method 'magic'; known: updp"):
        compare(dataclasses.replace(CONFIG, methods=("magic",), out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="unknown step 'nap'; known: prepare, train, measure"):
        compare(CONFIG, "nap")
    for text in ("fast", "speedup", "speedup=x", "luck=3"):
        with pytest.raises(ConfigError, match="a budget is written name=value"):
            parse_budget(SearchConfig(), text)
    assert parse_budget(SearchConfig(blocks=3), "speedup=1.5") == SearchConfig(speedup=1.5)
    assert not (tmp_path / "out").exists()
    with pytest.raises(MethodError, match="unknown control 'updp'; known: longer, smaller-images, scratch"):
        compare(dataclasses.replace(CONFIG, controls=("updp",)))


def test_the_smallest_ratio_within_a_limit():
    assert ratio_within(lambda ratio: 1 - ratio, 0.6) == pytest.approx(0.4, abs=0.1 / 2**3)
    with pytest.raises(BudgetError, match="does not reach"):
        ratio_within(lambda ratio: 1.0, 0.5)


@pytest.mark.skipif(
    not HAS_TORCH_PRUNING, reason="torch-pruning is an optional extra (rivals), and not installed"
)
@pytest.mark.parametrize("family", ["resnet", "mobilenet", "convnext", "convnext_linear", "vit"])
def test_channel_pruning_gives_a_working_net(family):
    from nets import build

    model, size = build(family)
    x = torch.randn(2, *size)
    before = model(x)
    sizes = [count_parameters(prune_channels(model, size, ratio)) for ratio in (0.0, 0.25, 0.5)]
    assert sizes[0] > sizes[1] > sizes[2]
    pruned = prune_channels(model, size, 0.5).eval()
    assert pruned(x).shape == before.shape and pruned(x).isfinite().all()
    assert torch.equal(model(x), before)


def test_several_processes_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"runs on one process, and 2 were started.*--seeds"):
        compare(dataclasses.replace(CONFIG, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_trials_that_are_done_are_cleared(finished):
    """As after a kill between the writing of a result and the deleting of what it was trained from."""
    orphans = [path.with_name("finetune.state") for path in finished.out.rglob("trial.json")]
    for orphan in orphans:
        orphan.write_bytes(b"left")
    compare(finished, "train")
    assert len(orphans) > 4 and not list(finished.out.rglob("*.state"))


def test_the_largest_images_within_a_budget():
    assert size_within(lambda size: size**2, 1e4, 128) == 96
    assert size_within(lambda size: size**2, 1e9, 128) == 120
    with pytest.raises(BudgetError, match="images of 32 pixels do not reach 100"):
        size_within(lambda size: size**2, 100, 128)


def test_a_net_on_smaller_images():
    net = OnSmaller(torch.nn.Identity(), 3)
    constant = torch.full((2, 1, 9, 9), 0.5)
    assert torch.allclose(net(constant), torch.full((2, 1, 3, 3), 0.5))
    ramp = torch.arange(9.0).expand(1, 1, 9, 9)
    assert net(ramp)[0, 0, 0].tolist() == pytest.approx([1.2, 4.0, 6.8], abs=0.21)  # means, not every third
    assert net(ramp)[0, 0, 0, 1] == 4.0


@pytest.mark.parametrize("model", ["deit_tiny_patch16_224"])
def test_a_model_of_one_size_has_no_smaller_images(model, tmp_path):
    config = dataclasses.replace(
        CONFIG,
        model=model,
        model_kwargs=("img_size=28", "patch_size=7", "in_chans=1", "embed_dim=24", "depth=2", "num_heads=2"),
        out=tmp_path,
        methods=(),
        controls=("smaller-images",),
        seeds=(0,),
    )
    comparison = compare_module.Comparison(config)
    with pytest.raises(BudgetError, match="takes images of one size only"):
        comparison._image_size(comparison._run(out=tmp_path / "prepare"), "macs=0.95")
