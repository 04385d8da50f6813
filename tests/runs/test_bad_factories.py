"""Jobs on a function of the user's own that fails, or gives another model than before: nothing is left half-written."""

import dataclasses
import hashlib
import sys

import pytest
from own_code import BLOCK
from small_run import CONFIG

from depthfuse import SubnetSpec, Supernet, allow_origin, load, merge, origins, prune
from depthfuse.checkpoint import save_tensors
from depthfuse.errors import CheckpointError, SpecError
from depthfuse.spec import ModelSource

MODULE = (
    BLOCK
    + """
import itertools
from torch import nn

kind, calls = "first", itertools.count()


def build(num_classes=10, width=8):
    if kind == "raises":
        raise ZeroDivisionError("on purpose")
    if kind == "raises the second time" and next(calls):
        raise ZeroDivisionError("on purpose")
    if kind == "no model":
        return "a net"
    if kind == "other shapes each time":
        width += next(calls)
    if kind == "wide":
        width = 12
    if kind == "no blocks":
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, num_classes))
    moved = [nn.Identity()] if kind == "moved" else []
    blocks = [*moved, Block(width), Block(width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]
    return nn.Sequential(nn.Conv2d(1, width, 4, 4), *blocks, *head)
"""
)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module of the user's own; its `kind` says what its factory gives from now on."""
    (tmp_path / "changing_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origins, "_allowed", set())
    monkeypatch.syspath_prepend(tmp_path)
    allow_origin("changing_nets:build")
    yield __import__("changing_nets")
    sys.modules.pop("changing_nets", None)


def config_in(folder, *arguments):
    return dataclasses.replace(
        CONFIG, model="changing_nets:build", model_kwargs=arguments, out=folder / "run"
    )


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("raises", (), "changing_nets refused the arguments .* ZeroDivisionError on purpose"),
        ("raises the second time", (), "changing_nets refused the arguments .* ZeroDivisionError on purpose"),
        ("no model", (), "changing_nets:build gave a str, expected a torch.nn.Module"),
        ("other shapes each time", (), "'changing_nets:build' gave models of other shapes"),
        ("no blocks", (), "changing_nets:build has no block that can be pruned"),
        ("first", ("depth=3",), r"for 'build': TypeError build\(\) got an unexpected keyword argument 'depth'"),
    ],
)  # fmt: skip
def test_a_job_does_not_begin(own, tmp_path, kind, arguments, says):
    own.kind = kind
    with pytest.raises(SpecError, match=says):
        prune(config_in(tmp_path, *arguments))
    assert not (tmp_path / "run").exists()


def test_a_job_does_not_go_on_with_another_model(own, tmp_path):
    config = config_in(tmp_path)
    prune(config, until="baseline")
    before = hashes(tmp_path / "run")
    assert "baseline.safetensors" in before
    for kind, error, says in (
        (
            "wide",
            CheckpointError,
            r"baseline.safetensors holds the weights of another model: 0.weight is \[8",
        ),
        ("moved", CheckpointError, "baseline.safetensors holds the weights of another model: lacks"),
        ("raises", SpecError, "changing_nets refused"),
    ):
        own.kind = kind
        with pytest.raises(error, match=says):
            prune(config, until="supernet")
        assert hashes(tmp_path / "run") == before
    own.kind = "first"
    prune(config, until="baseline")
    assert hashes(tmp_path / "run") == before


def test_a_result_is_not_loaded_into_another_model(own, tmp_path):
    supernet = Supernet(ModelSource.make("changing_nets:build", num_classes=3).build()).eval()
    supernet.set_choices({"1": "dense"})
    supernet.spec().save(tmp_path / "subnet.json")
    save_tensors(tmp_path / "merged.safetensors", merge(supernet, (1, 28, 28)).state_dict(), {})
    assert type(load(tmp_path)[1]).__name__ == "MergedConv"
    before = hashes(tmp_path)
    for kind, error, says in (
        (
            "wide",
            CheckpointError,
            "merged.safetensors holds the weights of another model than changing_nets:build: 0.weight is",
        ),
        ("moved", SpecError, r"no prunable block 1; .* \(changing_nets:build\)"),
        ("no blocks", SpecError, "changing_nets:build has no block that can be pruned"),
        ("raises", SpecError, "changing_nets refused"),
        ("raises the second time", SpecError, "changing_nets refused"),
        ("no model", SpecError, "changing_nets:build gave a str"),
    ):
        own.kind = kind
        with pytest.raises(error, match=says):
            load(tmp_path)
    own.kind = "moved"
    spec = SubnetSpec.load(tmp_path / "subnet.json")
    net = Supernet(spec.source.build())
    with pytest.raises(SpecError, match="no prunable block 1"):
        net.subnet(spec)
    assert set(net.choices().values()) == {"keep"}  # nothing was switched
    assert hashes(tmp_path) == before
