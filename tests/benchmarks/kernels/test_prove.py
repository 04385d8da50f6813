"""What compiled kernels use, on cards that are not here: a small slice of benchmarks/results/prove_*.csv."""

import csv
import os
import subprocess
import sys

import pytest

from benchmarks.kernels.prove import faults
from benchmarks.kernels.resources import Resources, _lines_in_loops
from depthfuse.kernels.launch import TARGETS

GOOD = Resources(64, 64, 0, 0, 32768, 3, "v_mfma_f32_32x32x8f16 x24", "ds_read_b128 x22", 0)


@pytest.fixture(scope="module", params=["gfx908", "sm_90"])
def rows(request, tmp_path_factory) -> list[dict]:
    """The prover's quick table of one target, from a process of its own: here kernels may be interpreted."""
    folder = tmp_path_factory.mktemp("prove")
    command = [sys.executable, "-m", "benchmarks.kernels.prove", "--quick", "--targets", request.param]
    command += ["--out", str(folder / "table.csv")]
    result = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "0", "DEPTHFUSE_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_compiled_kernels_have_no_faults(rows):
    assert {row["op"] for row in rows} >= {"conv2d", "linear", "depthwise_conv2d"}
    for row in rows:
        assert row["faults"] == ""
        assert (row["spills"], row["private_bytes"], row["narrow_reads_in_loop"]) == ("0", "0", "0")
        assert float(row["roofline_us"]) > 0


def test_matrix_operators_use_matrix_instructions(rows):
    # a tile whose left operand is computed in registers (normalised rows) takes Hopper's warp-level product instead
    instructions = {"gfx908": ("v_mfma_f32_",), "sm_90": ("HGMMA", "HMMA")}
    products = [row for row in rows if row["op"] in ("conv2d", "linear")]
    assert products
    for row in products:
        assert any(name in row["matrix"] for name in instructions[row["target"]]), row


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 1}, "spills"),
        ({"private_bytes": 16}, "private_memory"),
        ({"shared_bytes": 65537}, "shared_memory"),
        ({"narrow_reads_in_loop": 4}, "narrow_reads"),
        ({"matrix": ""}, "no_matrix_instructions"),
        ({"occupancy": 1}, "occupancy"),
    ],
)
def test_each_fault_is_found(change, fault):
    assert faults(GOOD, "conv2d_kernel", "fp16", TARGETS["gfx908"]) == []
    changed = Resources(**(vars(GOOD) | change))
    assert faults(changed, "conv2d_kernel", "fp16", TARGETS["gfx908"]) == [fault]


def test_loops_are_the_lines_that_control_comes_back_to():
    assembly = """
        s_cbranch_scc0 .LBB0_3
    .LBB0_1:
        ds_read_u16 v1
    .LBB0_2:
        s_cbranch_vccz .LBB0_2
        s_cbranch_scc1 .LBB0_1
    .LBB0_3:
        ds_read_u16 v2
    """
    lines = [line[4:] for line in assembly.strip("\n").splitlines()]
    assert _lines_in_loops(lines) == [False, True, True, True, True, True, False, False, False]


def test_an_exit_that_stands_inside_a_loop_is_not_part_of_it():
    assembly = """
    .LBB0_1:
        ds_read_b128 v1
        s_cbranch_scc1 .LBB0_3
    .LBB0_2:
        ds_read_u16 v2
        s_endpgm
    .LBB0_3:
        ds_read_b64 v3
        s_branch .LBB0_1
    """
    lines = [line[4:] for line in assembly.strip("\n").splitlines()]
    assert _lines_in_loops(lines) == [True, True, True, False, False, False, True, True, True, False]


def test_the_interpreter_cannot_be_proven():
    command = [sys.executable, "-m", "benchmarks.kernels.prove", "--quick"]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "TRITON_INTERPRET is set" in result.stderr
