"""Waits on every way through the text, taken or not."""

import pytest

from benchmarks.gfx908 import waits
from benchmarks.gfx908.assembly import parse
from benchmarks.gfx908.faults import Fault
from benchmarks.gfx908.machine import Program

LOAD, USE = "global_load_dword v1, v0, s[0:1]", "v_mov_b32_e32 v9, v1"
STORE = "global_store_dword v0, v4, s[0:1]"


def check(*lines: str) -> None:
    text = "\n".join(line if line.endswith(":") else f"\t{line}" for line in (*lines, "s_endpgm"))
    waits.check(Program(parse(text + "\n", 0, 1)))


def finds(*lines: str, match: str = "may be under way") -> None:
    with pytest.raises(Fault, match=match) as found:
        check(*lines)
    assert found.value.kind == "wait"


def test_a_straight_line():
    check(LOAD, "s_waitcnt vmcnt(0)", USE)
    finds(LOAD, USE, match="v1 is used while line 1: global_load_dword .*; line 2: v_mov_b32_e32 v9, v1")
    check(LOAD, STORE, STORE, "s_waitcnt vmcnt(2)", USE)
    finds(LOAD, STORE, STORE, "s_waitcnt vmcnt(3)", USE)
    finds(LOAD, "s_waitcnt lgkmcnt(0)", USE)
    finds("s_load_dword s4, s[0:1], 0x0", "ds_write_b32 v0, v1", "s_waitcnt lgkmcnt(1)", "s_mov_b32 s5, s4")
    check("s_load_dword s4, s[0:1], 0x0", "s_waitcnt lgkmcnt(0)", "s_mov_b32 s5, s4")


def test_a_way_that_is_rarely_taken():
    """The wait stands on one side of a branch only; or only in front of a loop that may not run."""
    finds(LOAD, "s_cbranch_scc1 .LBB0_1", "s_waitcnt vmcnt(0)", ".LBB0_1:", USE)
    check(LOAD, "s_cbranch_scc1 .LBB0_1", ".LBB0_1:", "s_waitcnt vmcnt(0)", USE)
    check("s_cbranch_execz .LBB0_1", LOAD, "s_waitcnt vmcnt(0)", ".LBB0_1:", USE)
    finds("s_cbranch_execz .LBB0_1", LOAD, ".LBB0_1:", "s_barrier", USE)


def test_around_a_loop():
    """What is loaded at the end of a turn is used in the next; stores pile up until the counter is full."""
    finds(".LBB0_1:", USE, LOAD, "s_cbranch_scc1 .LBB0_1")
    check(".LBB0_1:", "s_waitcnt vmcnt(0)", USE, LOAD, "s_cbranch_scc1 .LBB0_1")
    check(".LBB0_1:", STORE, "s_cbranch_scc1 .LBB0_1", "s_waitcnt vmcnt(0)", USE)
    finds(
        LOAD,
        ".LBB0_1:",
        STORE,
        "s_cbranch_scc1 .LBB0_1",
        "s_waitcnt vmcnt(2)",
        USE,
    )
    # the load has come before a 63rd access can be issued
    check(LOAD, *[STORE] * 63, USE)
    finds(LOAD, *[STORE] * 62, USE)


def test_a_load_may_follow_one_of_its_kind():
    check(LOAD, LOAD, "s_waitcnt vmcnt(0)", USE)
    finds(LOAD, "ds_read_b32 v1, v0")
    finds(LOAD, "v_mov_b32_e32 v1, 0")
