"""Our kernels, compiled for the MI100, run by their code: right results, and faults planted in them are found."""

import csv
import os
import subprocess
import sys

import pytest

from benchmarks.gfx908.planted import SWAPPED, Plant, is_lost, plants
from depthfuse.selftest.cases import OPS


def table_of(folder, *arguments: str) -> tuple[list[dict], str]:
    """Rows and summary of a command, from a process of its own: here kernels may be interpreted."""
    command = [sys.executable, "-m", "benchmarks.gfx908", *arguments, "--out", str(folder / "table.csv")]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file)), (folder / "table.md").read_text()


@pytest.fixture(scope="module")
def operators(tmp_path_factory) -> tuple[list[dict], str]:
    cases = (
        "3x3",
        "stem 7x7",
        "depthwise 7x7 + LayerNorm",
        "LayerNorm",
        "plain",
        "7x7",
        "stride 1",
        "heads of 64",
    )
    arguments = ("--small", "--dtypes", "fp16", "--cases", *cases, "one image")
    return table_of(tmp_path_factory.mktemp("operators"), "operators", *arguments)


def test_every_operator_is_right_on_the_code_of_the_mi100(operators):
    """Integers bit for bit, reals within the float64 bound, odd shapes, outputs that start as NaN.

    Compiling takes most of the time: the other dtypes and cases are left to the whole command.
    """
    rows, summary = operators
    assert {row["op"] for row in rows} == set(OPS)
    assert {row["values"] for row in rows} == {"integers", "reals"}
    assert {row["outcome"] for row in rows} == {"right"}
    assert all(f"| `{op}` |" in summary for op in OPS)
    assert all(0 < float(row["share"]) <= 1 for row in rows if row["values"] == "reals")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[list[dict], str]:
    arguments = ("--small", "--dtypes", "fp16", "--cases", "stride 1", "--swaps", "8")
    return table_of(tmp_path_factory.mktemp("planted"), "planted", *arguments)


def test_planted_faults_are_found(planted):
    """In an inverted residual each wait, barrier and nop is needed. Registers may belong to the rows of its tile
    that are beyond the tensor: most of those that are swapped matter.
    """
    rows, summary = planted
    kinds = {row["kind"] for row in rows}
    assert kinds == {"wait removed", "wait weakened", "barrier removed", "nop removed", SWAPPED}
    assert [row for row in rows if not row["how"] and row["kind"] != SWAPPED] == []
    swapped = [bool(row["how"]) for row in rows if row["kind"] == SWAPPED]
    assert len(swapped) == 8 and sum(swapped) >= 5
    assert {row["how"] for row in rows if row["kind"] == "barrier removed"} == {"race"}
    assert {row["how"] for row in rows if row["kind"] == "nop removed"} == {"hazard"}
    assert {row["how"] for row in rows if row["kind"] == "wait removed"} <= {"wait", "race"}
    assert "| barrier removed |" in summary


ASSEMBLY = """kernel:
	s_load_dword s0, s[4:5], 0x0
	s_waitcnt vmcnt(3) lgkmcnt(0)
	buffer_load_dword v1, v0, s[8:11], 0 offen
	s_nop 0
	buffer_load_dword v2, v0, s[8:11], 0 offen
	s_nop 1
	v_sub_u32_e32 v3, v1, v2
	s_barrier
	s_endpgm
	.amdhsa_kernel kernel
	s_waitcnt vmcnt(0)
"""


def test_what_is_planted():
    """Not the nop between loads, which is for systems that replay them, and nothing after the code."""
    found = list(plants(ASSEMBLY, swaps=9))
    assert [(plant.kind, plant.line, plant.after) for plant in found if plant.kind != SWAPPED] == [
        ("wait removed", 2, ""),
        ("wait weakened", 2, "\ts_waitcnt vmcnt(4) lgkmcnt(0)"),
        ("wait weakened", 2, "\ts_waitcnt vmcnt(3) lgkmcnt(1)"),
        ("nop removed", 6, ""),
        ("barrier removed", 8, ""),
    ]
    assert {(plant.line, plant.after) for plant in found if plant.kind == SWAPPED} == {
        (3, "\tbuffer_load_dword v0, v1, s[8:11], 0 offen"),
        (5, "\tbuffer_load_dword v0, v2, s[8:11], 0 offen"),
        (7, "\tv_sub_u32_e32 v1, v3, v2"),
    }
    assert len(list(plants(ASSEMBLY, swaps=1))) == 6
    assert found[0].into(ASSEMBLY).split("\n")[2] == ""


def test_a_plant_that_is_no_fault_is_not_lost():
    row = {"how": "", "kind": "wait removed", "waves": "1", "before": "s_waitcnt lgkmcnt(0)"}
    assert (
        not is_lost(row) and is_lost(row | {"waves": "4"}) and is_lost(row | {"before": "s_waitcnt vmcnt(0)"})
    )
    assert not is_lost(row | {"waves": "4", "kind": SWAPPED}) and not is_lost(
        row | {"waves": "4", "how": "race"}
    )
    assert Plant("x", 1, "b", "c").into("a\nb") == "a\nc"
