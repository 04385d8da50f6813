"""What compiled kernels use, on cards that are not here: a small slice of benchmarks/results/prove_*.csv."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels.goals import WORRIES
from benchmarks.kernels.prove import merged
from depthfuse.devices import DEVICES


@pytest.fixture(scope="module", params=["gfx908", "sm_90"])
def table(request, tmp_path_factory) -> Path:
    """The prover's quick table of one target, from a process of its own: here kernels may be interpreted."""
    folder = tmp_path_factory.mktemp("prove")
    command = [sys.executable, "-m", "benchmarks.kernels.prove", "--quick", "--targets", request.param]
    # float32 has faults that are known: the fused MLP and Winograd spill
    command += ["--dtypes", "fp16", "bf16", "--out", str(folder / "table.csv")]
    result = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "0", "DEPTHFUSE_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "table.csv"


@pytest.fixture(scope="module")
def rows(table) -> list[dict]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_compiled_kernels_have_no_faults(rows):
    assert {row["op"] for row in rows} >= {"conv2d", "linear", "depthwise_conv2d"}
    for row in rows:
        assert row["faults"] == ""
        assert (row["spills"], row["private_bytes"], row["narrow_reads_in_loop"]) == ("0", "0", "0")
        assert float(row["roofline_us"]) > 0
    assert {row["dtype"] for row in rows} == {"fp16", "bf16"}


def test_loops_of_convolutions_are_read(rows):
    """The stem's channels are 3: it loads single values. Its loop has a barrier before and after each step's reads."""
    for row in rows:
        if row["op"] != "conv2d":
            continue
        assert "channels=3 " in row["shape"]
        assert "narrow_loads" in row["worries"].split()
        if row["target"] == "gfx908":
            assert "buffer_load_ushort x" in row["global_loads"]
            assert int(row["barriers"]) > int(row["drained_barriers"])  # loads stay in flight across most
            assert int(row["matrix_clocks"]) > 0 and int(row["vector_clocks"]) > 0
        else:
            assert "LDG.E.U16 x" in row["global_loads"]


def test_programs_are_whole(rows):
    for row in rows:
        workgroups, warps = int(row["workgroups"]), int(row["tile"].split("num_warps=")[1].split()[0])
        assert workgroups >= 1 and float(row["occupancy"]) == workgroups * warps / 4
        fewer = int(row["programs"]) < DEVICES[row["target"]].compute_units
        assert ("few_programs" in row["worries"].split()) is fewer


def test_the_summary_lies_beside_the_table(table, rows):
    text = table.with_suffix(".md").read_text()
    assert all(f"`{name}`" in text for name in WORRIES)
    assert f"| {rows[0]['target']} " in text and "| conv2d_kernel " in text


def test_matrix_operators_use_matrix_instructions(rows):
    # a tile whose left operand is computed in registers (normalised rows) takes Hopper's warp-level product instead
    instructions = {"gfx908": ("v_mfma_f32_",), "sm_90": ("HGMMA", "HMMA")}
    products = [row for row in rows if row["op"] in ("conv2d", "linear")]
    assert products
    for row in products:
        assert any(name in row["matrix"] for name in instructions[row["target"]]), row


def test_the_interpreter_cannot_be_proven():
    command = [sys.executable, "-m", "benchmarks.kernels.prove", "--quick"]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "TRITON_INTERPRET is set" in result.stderr


def row(target: str, op: str, network: str = "resnet34", batch: object = 1, **more) -> dict:
    return {
        "triton": "3.9",
        "target": target,
        "dtype": "fp16",
        "network": network,
        "batch": batch,
        "op": op,
    } | more


def test_a_table_is_added_to():
    old = [
        row("gfx908", "conv2d", batch="1"),
        row("gfx908", "linear", batch="1"),
        row("sm_90", "conv2d", batch="1"),
    ]
    new = [row("gfx908", "conv2d"), row("gfx908", "conv2d", batch=128)]
    assert merged(old, new) == [old[1], old[2], *new]
    assert merged([], new) == new
    with pytest.raises(ValueError, match=r"other columns \(tile\)"):
        merged(old, [row("gfx908", "conv2d", tile="")])
