"""Launches of real networks: some workgroups against float64, and the clocks that their code takes of each unit."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.gfx908.busy import UNITS
from benchmarks.gfx908.networks import few, is_exact, operands_of, wanted
from benchmarks.gfx908.operators import judge
from benchmarks.gfx908.times import clocks_of
from benchmarks.gfx908.trace import Event
from benchmarks.kernels.block_cases import AttentionCase, InvertedResidualCase, MlpCase
from benchmarks.kernels.cases import Conv2dCase, DepthwiseCase, LinearCase, WinogradCase
from depthfuse.selftest.oracle import Value

FLOPS_A_CLOCK = 1024  # of a compute unit in fp16: 184.6 TFLOP/s by 120 of them at 1502 MHz
SCRIPT = """
import dataclasses, json
from benchmarks.gfx908 import networks, times, units
network, ops = "deit_tiny_patch16_224", ["linear"]
for rows in (networks.rows([network], ops, ["fp16"]), units.rows([network], [1], ops, ["fp16"]),
             times.rows([network], [1], ops, ["fp16"])):
    print(json.dumps([dataclasses.asdict(next(rows))]))
"""


@pytest.fixture(scope="module")
def tables() -> list[list[dict]]:
    """The first linear layer of DeiT-Tiny, from a process of its own: here kernels may be interpreted."""
    command, environment = [sys.executable, "-c", SCRIPT], os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_some_workgroups_of_a_launch_are_compared(tables):
    executed = tables[0]
    assert [row["outcome"] for row in executed] == ["right"]
    assert [row["values"] for row in executed] == ["reals"]  # after LayerNorm
    for row in executed:
        ran, of = map(int, row["workgroups"].split(" of "))
        assert 3 <= ran < of and 0 < row["compared"] < 197 * 576


def test_units_are_counted(tables):
    """The matrix unit does what the tile's products ask for, at its peak rate; no bound is below the roofline."""
    for row in tables[1]:
        sizes = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", row["tile"])}
        products = 2 * sizes["BLOCK_M"] * sizes["BLOCK_N"] * 192
        assert row["matrix"] == products / FLOPS_A_CLOCK
        assert row["busiest"] in (*UNITS, "memory") and row["lds_conflicts"] >= 1
        assert row["share"] == pytest.approx(row["roofline_us"] / row["bound_us"], abs=0.05)
        assert 0 < row["share"] <= 1
        assert row["plain"] == 12


def test_times_are_simulated(tables):
    """No faster than the roofline, and no unit is busy for longer than the time."""
    for row in tables[2]:
        assert row["batch"] == 1 and row["resident"] >= 2 and row["plain"] == 12
        assert row["share"] == pytest.approx(row["roofline_us"] / row["simulated_us"], abs=0.01)
        assert 0 < row["share"] <= 1
        assert all(0 < row[unit] <= 1 for unit in ("vector", "matrix", "lds", "cache"))


@pytest.mark.parametrize(("grid", "clocks"), [(120, 400), (240, 800), (121, 800), (1200, 4000)])
def test_a_compute_unit_gets_its_share_of_the_grid(grid, clocks):
    """Beyond three rounds in proportion."""
    found, unit = clocks_of([[[Event("vector", 4)] * 100] * 4], grid, resident=1, bytes_moved=0)
    assert found == pytest.approx(clocks, rel=0.03)
    assert unit.shares()["vector"] == pytest.approx(1, rel=0.05)


def test_which_workgroups_run():
    assert few((7,), 1) == [(0, 0, 0), (3, 0, 0), (6, 0, 0)]
    assert few((2, 3), 1) == [(0, 1, 0), (1, 1, 0), (1, 2, 0)]
    assert few((1, 1, 4), 4) == [(0, 0, k) for k in range(4)]  # all parts of a split sum, on either axis
    assert few((1, 4), 4) == [(0, j, 0) for j in range(4)]


CASES = (
    (Conv2dCase(1, 8, 5, 6, 3, 2, 1, "relu", True, True), True),
    (Conv2dCase(1, 8, 5, 6, 3, 1, 1, "gelu"), False),
    (WinogradCase(1, 8, 5, 6, 3, 1, 1), True),
    (DepthwiseCase(1, 8, 5, 8, 3, 1, 1, norm=True), False),
    (LinearCase(5, 8, 6, norm=True), False),
    (InvertedResidualCase(1, 8, 5, 16, 8, 1, True), True),
    (MlpCase(5, 8, 16, norm=False), False),
    (AttentionCase(1, 5, 1, 32), False),
)


@pytest.mark.parametrize(("case", "exact"), CASES)
def test_the_reference_is_that_of_the_case(case, exact):
    """PyTorch's own result of the same operands is within the bound, and exact where integers stay exact."""
    assert is_exact(case) is exact
    operands = operands_of(case, torch.float32)
    value, error = wanted(case, operands)
    y = case.eager(**operands)
    assert judge(y, Value(value.reshape(y.shape), error.reshape(y.shape)), exact)[0] == "right"
