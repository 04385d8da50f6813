"""The profile of a network in the native engine: whatever a plan may hold has a name there."""

import sys

import pytest
import torch
from native_ops import needs_engine

from benchmarks.kernels import engine
from depthfuse.acceleration.running.native_engine import WINOGRAD
from depthfuse.native import plan as native


def test_every_operation_and_algorithm_has_a_name():
    assert sorted(engine.OPERATIONS) == list(range(native.RESIZE + 1))
    by_tiles = {way for ways in native.BY_TILES.values() for way in ways}
    assert set(engine.ALGORITHMS) == {native.DIRECT, *WINOGRAD, *by_tiles}


@needs_engine
@pytest.mark.parametrize("variant", ["plain", "merged"])
def test_a_network_is_shown(variant, monkeypatch, capsys):
    arguments = [
        "--model",
        "mobilenetv2_050",
        "--variant",
        variant,
        "--threads",
        str(torch.get_num_threads()),
        "--runs",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["engine", *arguments])
    engine.main()
    shown = capsys.readouterr().out.splitlines()
    assert "GFLOP/s measured peak of a core" in shown[0] and shown[-1].startswith("all ")
    assert any("depthwise 3x3" in line for line in shown)
