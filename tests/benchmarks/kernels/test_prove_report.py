"""The prover's summary: counts of worries, and the heaviest rows."""

import pytest

from benchmarks.kernels.prove_report import shares, summary


def row(**values) -> dict:
    """As read from a CSV."""
    plain = {
        "target": "gfx908",
        "dtype": "fp16",
        "network": "resnet34",
        "batch": "1",
        "kernel": "conv2d_kernel",
    }
    plain |= {"shape": "batch=1 channels=64 affine=False act=none", "tile": "BLOCK_M=64", "layers": "1"}
    return plain | {"roofline_us": "1.0", "faults": "", "worries": ""} | values


def lines(text: str, *parts: str) -> list[list[str]]:
    """Cells of the table lines with all these parts."""
    found = [
        line for line in text.splitlines() if line.startswith("|") and all(part in line for part in parts)
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_shares_are_within_one_network():
    rows = [row(layers="3"), row(roofline_us="2.5", layers="2"), row(batch="128"), row(dtype="bf16")]
    assert shares(rows) == pytest.approx([3 / 8, 5 / 8, 1, 1])
    assert shares([row(roofline_us=0.0, layers=1)]) == [0]


def test_worries_are_counted_by_target_and_kernel():
    rows = [
        row(worries="drained_barriers few_programs"),
        row(worries="drained_barriers", faults="spills occupancy"),
        row(kernel="linear_kernel"),
        row(target="sm_90", worries="one_workgroup"),
    ]
    text = summary(rows).split("## The")[0]
    head = ["target", "kernel", "rows", "faults", "drained_barriers"]
    assert lines(text, "target")[0][:5] == head
    # rows, faults, then the worries in the order of WORRIES
    assert lines(text, "gfx908", "conv2d")[0][2:] == ["2", "1", "2", "0", "0", "0", "0", "1"]
    assert lines(text, "gfx908", "linear")[0][2:] == ["1", "0", "0", "0", "0", "0", "0", "0"]
    assert lines(text, "sm_90", "conv2d")[0][2:] == ["1", "0", "0", "0", "0", "0", "1", "0"]


def test_the_heaviest_with_a_worry_come_first():
    rows = [row(tile=f"BLOCK_M={n}", roofline_us=str(n), worries="vector_bound") for n in range(1, 13)]
    rows += [
        row(tile="BLOCK_M=99", roofline_us="100", worries="few_programs"),
        row(tile="BLOCK_M=98", roofline_us="99"),
    ]
    text = summary(rows).split("## The")[1]
    tiles = [cells[6] for cells in lines(text, "vector_bound")]
    assert tiles == [f"BLOCK_M={n}" for n in range(12, 2, -1)]
    assert "BLOCK_M=9 " in text and "BLOCK_M=99" not in text and "BLOCK_M=98" not in text
    assert lines(text, "BLOCK_M=12")[0][1] == "4.3 %"  # 12 of 78 + 199
    assert lines(text, "BLOCK_M=12")[0][5] == "batch=1 channels=64"
