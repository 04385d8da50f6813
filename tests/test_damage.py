"""Every file that depthfuse reads, damaged: it loads equal, or an error of ours names it.

A small slice of `benchmarks.tools.torture`.
"""

import random

import pytest
import safetensors.torch
import torch

from benchmarks.tools import damage
from depthfuse import ModelSource, Supernet, accelerate, merge
from depthfuse.checkpoint import load_json, save_json, save_state, save_tensors, save_text
from depthfuse.config import PruneConfig, to_yaml
from depthfuse.costs.table import CostTable
from depthfuse.errors import CheckpointError
from depthfuse.measured_cache import MeasuredCache
from depthfuse.runs.report import RESULTS, merge_document
from depthfuse.searching.journal import Journal
from depthfuse.searching.scoring import SubnetScore

KWARGS = {"channels": (4, 4, 8, 8), "layers": (1, 1, 1, 1), "in_chans": 1, "num_classes": 3}
NET = {
    "top1": 50.0,
    "parameters": 1000,
    "macs": 2e6,
    "latency_ms": 1.5,
    "latency_quartiles_ms": [1.4, 1.6],
    "speedup": 1.1,
}
TRIAL = {
    **{"method": "updp", "budget": "blocks=1", "seed": 0, "top1": 50.0, "loss": 0.5, "baseline_top1": 51.0},
    **{
        "choices": {"layer1.0": "compact"},
        "channel_ratio": None,
        "image_size": None,
        "macs": 2e6,
        "parameters": 1000,
        "seconds": 2.5,
    },
}
BUDGET = {"name": "speedup", "unit": "x", "wanted": 1.5, "reached": 1.4, "met": False}
CONDITIONS = {"device": "cpu", "threads": 1, "input_size": [1, 28, 28], "predicted": False}
SETTINGS = {"model": "resnet18", "conditions": CONDITIONS, "chosen_by": CONDITIONS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a finished run and of a comparison, without the hours."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    source = ModelSource.make("resnet18", **KWARGS)
    supernet = Supernet(source.build()).eval()
    supernet.set_choices({"layer1.0": "compact", "layer3.0": "dense"})
    spec = supernet.spec()
    spec.save(folder / "subnet.json")
    merged = merge(supernet, (1, 28, 28))
    save_tensors(folder / "merged.safetensors", merged.state_dict(), {"model": "resnet18"})
    safetensors.torch.save_file(source.build().state_dict(), folder / "foreign.safetensors")
    fast = accelerate(merged, torch.randn(1, 1, 28, 28), tune="heuristic", verify=False)
    fast.save(folder / "fast.safetensors")
    saved = {path: {name: 0.1 for name in names} for path, names in supernet.options().items()}
    CostTable(CONDITIONS, "ms", 3.25, saved).save(folder / "latency.json")
    book = Journal(folder / "search.jsonl")
    for number, name in enumerate(["compact", "dense", "drop"]):
        book.add({"layer1.0": name}, SubnetScore(50.0 + number, 0.5))
    save_text(folder / "config.yaml", to_yaml(PruneConfig(model_kwargs=("in_chans=1",))))
    blocks, choices = supernet.options(), spec.mapping()
    feeding = {"classes": ["a", "b"], "input_size": [1, 28, 28], "mean": [0.5], "std": [0.25]}
    save_json(folder / "feeding.json", feeding)
    results = {**SETTINGS, "rows": [{"net": "baseline", **NET}], "choices": choices, "blocks": blocks}
    results |= {"noisy_latencies": ["layer1.0 (dense)"], "merge": str(merged.merge_report), "budget": BUDGET}
    save_json(folder / "results.json", results)
    save_json(folder / "merge.json", merge_document(merged.merge_report))
    rows = [{"stage": "baseline", "iteration": i, "epoch": i / 2, "loss": 0.5, "lr": 1e-3} for i in range(2)]
    save_json(folder / "history_baseline.json", rows)
    save_json(folder / "seconds_baseline.json", 12.5)
    optimizer = torch.optim.AdamW(merged.parameters())
    state = {"identity": {"stage": "baseline", "seed": 0}, "net": {"w": torch.ones(2), "n": torch.tensor(3)}}
    save_state(folder / "baseline.state", {**state, "optimizer": optimizer.state_dict(), "history": rows})
    save_json(folder / "updp" / "trial.json", TRIAL)
    timed = {**TRIAL, "latency_ms": 1.5, "speedup": 1.2}
    baseline = {"macs": 3e6, "parameters": 2000, "seconds": 2.5, "latency_ms": 2.0}
    lost = {"method": "drop", "budget": "blocks=1", "seed": 0, "unreachable": "out of reach"}
    comparison = {**SETTINGS, "baseline": baseline, "trials": [timed], "unreachable": [lost]}
    save_json(folder / "comparison" / "results.json", comparison)
    return folder


def test_the_slice_has_every_kind_of_file(folder):
    seen = {kind for _, kind in damage.artefacts(folder)}
    assert seen == set(damage.KINDS.values())


# Files that a model is built of take longer to read than others.
SLOW = ("subnet.json", "fast.safetensors")


def check(folder, draw, slow, quick):
    bad, met = [], set()
    for path, kind in damage.artefacts(folder):
        expected = kind.read(path)
        checked = kind.checked
        for told, data in draw(path, slow if path.name in SLOW else quick, random.Random(path.name)):
            verdict = damage.verdict(path, kind, data, expected)
            met.add(verdict.outcome)
            if verdict.bad(checked):
                bad.append(f"{path.name}, {told}: {verdict.outcome} {verdict.told:.200}")
    assert not bad, "\n".join(bad)
    return met


def test_files_cut_short(folder):
    assert "refused" in check(folder, lambda path, n, rng: damage.cuts(path.read_bytes(), n, rng), 20, 80)


def test_files_with_a_flipped_bit(folder):
    assert "refused" in check(folder, lambda path, n, rng: damage.flips(path.read_bytes(), n, rng), 20, 80)


def test_files_with_a_value_of_another_kind(folder):
    """Their checksums match: whoever can write a file can sign it. Another value may be as good as the old."""

    bad = []
    for path, kind in damage.artefacts(folder):
        expected = kind.read(path)
        for told, data in damage.crafted(path, 30 if path.name in SLOW else 80, random.Random(path.name)):
            verdict = damage.verdict(path, kind, data, expected)
            if verdict.bad(checked=False):
                bad.append(f"{path.name}, {told}: {verdict.outcome} {verdict.told:.200}")
    assert not bad, "\n".join(bad)


def test_answers_of_the_measured_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path))
    cache, question = MeasuredCache.of(torch.device("cpu")), {"op": "conv", "shape": [1, 2, 3]}
    cache.put(question, {"winner": "gemm", "latency_ms": {"gemm": 0.25}})
    data, rng = cache.path(question).read_bytes(), random.Random(0)
    met = set()
    for told, damaged in [*damage.cuts(data, 60, rng), *damage.flips(data, 120, rng)]:
        verdict = damage.cache_verdict(cache, question, damaged)
        assert not verdict.bad(checked=True), f"{told}: {verdict}"
        met.add(verdict.outcome)
    for told, damaged in damage.crafted(cache.path(question), 60, rng):
        verdict = damage.cache_verdict(cache, question, damaged)
        assert not verdict.bad(checked=False), f"{told}: {verdict}"
    assert met == {"refused"}


@pytest.mark.parametrize("wrong", [[[]], [None], "layer1.0", {}])
def test_every_entry_of_the_results_that_is_shown_is_checked(folder, tmp_path, wrong):
    results = load_json(folder / "results.json", RESULTS)
    save_json(tmp_path / "results.json", results | {"noisy_latencies": wrong})
    with pytest.raises(CheckpointError, match="noisy_latencies"):
        load_json(tmp_path / "results.json", RESULTS)
