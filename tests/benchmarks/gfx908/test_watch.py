"""What is watched while code runs: each fault in its smallest form, and beside it the code that is right."""

import numpy as np
import pytest
from gfx908_snippets import execute

from benchmarks.gfx908.faults import KINDS, Fault
from benchmarks.gfx908.memory import Memory

LANE = np.arange(64, dtype=np.uint32)
LOAD, LOAD_2 = "global_load_dword v1, v0, s[0:1]\n", "global_load_dword v2, v0, s[0:1] offset:4\n"
WRITE, READ = "ds_write_b32 v0, v4\n", "ds_read_b32 v3, v0\n"
WAVE = np.arange(2, dtype=np.uint32)[:, None]


def run(text: str, **more: object):
    memory = Memory({"x": np.arange(400, dtype=np.uint32).view(np.uint8)})
    given = {"v": {0: LANE * 4, 4: LANE, 5: LANE}, "memory": memory, "address": {0: "x"}, "lds": 1024}
    return execute(text.strip("\n"), **(given | more))


def finds(kind: str, text: str, match: str | None = None, **more: object) -> None:
    assert kind in KINDS
    with pytest.raises(Fault, match=match) as found:
        run(text, **more)
    assert found.value.kind == kind, found.value


# right with the wait that is written here, wrong with the one beside it (or none)
WAITS = [
    (LOAD + "{}\nv_mov_b32_e32 v9, v1", "vmcnt(0)", None),
    (LOAD + LOAD_2 + "{}\nv_mov_b32_e32 v9, v1", "vmcnt(1)", "vmcnt(2)"),
    (LOAD + LOAD_2 + "{}\nv_mov_b32_e32 v9, v2", "vmcnt(0)", "vmcnt(1)"),
    (
        LOAD + "global_store_dword v0, v4, s[0:1] offset:512\n{}\nv_mov_b32_e32 v9, v1",
        "vmcnt(1)",
        "lgkmcnt(0)",
    ),
    (LOAD + "{}\nv_mov_b32_e32 v1, 0", "vmcnt(0)", None),  # the load would come after
    (LOAD + "{}\nv_mov_b32_e32 v9, v1", "vmcnt(0) lgkmcnt(0)", "vmcnt(63)"),
    (WRITE + READ + "{}\nv_mov_b32_e32 v9, v3", "lgkmcnt(0)", "lgkmcnt(1)"),
    (WRITE + READ + "ds_read_b32 v8, v0\n{}\nv_mov_b32_e32 v9, v3", "lgkmcnt(1)", "lgkmcnt(2)"),
    ("ds_swizzle_b32 v1, v0 offset:swizzle(SWAP,1)\n{}\nv_mov_b32_e32 v9, v1", "lgkmcnt(0)", "vmcnt(0)"),
    ("s_load_dword s4, s[0:1], 0x0\n{}\ns_mov_b32 s5, s4", "lgkmcnt(0)", None),
    # scalar loads come in any order: a count above zero says nothing
    (
        "s_load_dword s4, s[0:1], 0x0\ns_load_dword s5, s[0:1], 0x4\n{}\ns_mov_b32 s6, s4",
        "lgkmcnt(0)",
        "lgkmcnt(1)",
    ),
    ("s_load_dword s4, s[0:1], 0x0\n" + WRITE + "{}\ns_mov_b32 s6, s4", "lgkmcnt(0)", "lgkmcnt(1)"),
    ("global_atomic_add v1, v0, v4, s[0:1] glc\n{}\nv_mov_b32_e32 v9, v1", "vmcnt(0)", None),
]


@pytest.mark.parametrize(("text", "enough", "little"), WAITS)
def test_loads_are_waited_for(text, enough, little):
    run(text.format(f"s_waitcnt {enough}"))
    finds(
        "wait", text.format(f"s_waitcnt {little}" if little else "s_nop 0"), "is used while .* is under way"
    )


def test_a_load_may_follow_a_load_into_the_same_register():
    run(LOAD + LOAD.replace("offset", "") + "s_waitcnt vmcnt(0)\nv_mov_b32_e32 v9, v1")
    finds("wait", LOAD + "ds_read_b32 v1, v0")


@pytest.mark.parametrize(
    "text",
    [
        "global_store_dword v0, v7, s[0:1]",
        "global_load_dword v1, v7, s[0:1]",
        "v_cmp_eq_u32_e32 vcc, 0, v7",
        "v_add_u32_e32 v8, v7, v0\nglobal_store_dword v0, v8, s[0:1]",  # what is computed from it
        "v_mov_b32_e32 v8, 0\nv_add_u32_e32 v8, v8, v7\nglobal_store_dword v0, v8, s[0:1]",
        "v_readfirstlane_b32 s4, v7",
        "v_mov_b32_e32 v8, s9\nds_write_b32 v0, v8",
        "s_add_u32 s4, s9, s9",
        "v_mfma_f32_16x16x4f32 a[0:3], v0, v7, 0",
        "v_mfma_f32_16x16x4f32 a[0:3], v0, v0, a[4:7]",
        "v_accvgpr_read_b32 v8, a9\nglobal_store_dword v0, v8, s[0:1]",
        "s_and_b64 vcc, vcc, exec",
        "s_cbranch_vccnz .LBB0_1\n.LBB0_1:\ns_nop 0",
        "v_cndmask_b32_e64 v8, v7, v0, s[0:1]\nglobal_store_dword v0, v8, s[0:1]",
        # defined in the lanes that are active first, read in all
        "s_mov_b64 exec, s[2:3]\nv_mov_b32_e32 v7, 1\ns_mov_b64 exec, -1\nglobal_store_dword v0, v7, s[0:1]",
    ],
)
def test_registers_that_hold_nothing(text):
    finds("undefined register", text, "holds nothing yet", s={2: 3, 3: 0})


def test_what_is_never_used_need_not_be_defined():
    """Compilers compute with it: in lanes that are masked later, in halves that are dropped, in cases not selected."""
    run(
        """v_add_u32_e32 v8, v7, v0
        v_mad_u64_u32 v[12:13], s[4:5], v0, v0, v[20:21]
        s_mov_b64 exec, s[2:3]
        v_mov_b32_e32 v7, 1
        global_store_dword v0, v7, s[0:1]
        s_mov_b64 exec, -1
        v_cndmask_b32_e64 v8, v0, v7, s[2:3]
        global_store_dword v0, v8, s[0:1] offset:1024
        v_writelane_b32 v9, s2, 3
        v_readlane_b32 s6, v9, 3
        v_mad_u64_u32 v[14:15], s[4:5], v0, v0, v[0:1]
        global_store_dword v0, v14, s[0:1] offset:512""",
        s={2: 3, 3: 0},
        v={0: LANE * 4, 20: LANE},
    )


# two waves: each line is run by both, at addresses of their own (v0), or of the other one (v6)
SHARED = {
    "v": {0: (64 * WAVE + LANE) * 4, 6: (64 * (1 - WAVE) + LANE) * 4, 4: 64 * WAVE + LANE, 5: 7},
    "waves": 2,
}
CROSS_READ, CROSS_WRITE = "ds_read_b32 v3, v6\n", "ds_write_b32 v6, v4\n"
DONE, BARRIER = "s_waitcnt lgkmcnt(0)\n", "s_waitcnt lgkmcnt(0)\ns_barrier\n"

RACES = [
    (WRITE, CROSS_READ),  # read what the other wave writes
    (WRITE + BARRIER + READ, CROSS_WRITE),  # overwrite what it reads
    (WRITE, CROSS_WRITE),  # both write, different values
    (WRITE + BARRIER + READ + DONE + CROSS_READ, WRITE),  # several have read
    ("ds_write_b64 v8, v[4:5]\n", "ds_read_b64 v[12:13], v10\n"),
]


@pytest.mark.parametrize(("before", "after"), RACES)
def test_waves_that_share_lds_need_a_barrier_between(before, after):
    wide = {"v": SHARED["v"] | {8: (64 * WAVE + LANE) * 8, 10: (64 * (1 - WAVE) + LANE) * 8}, "waves": 2}
    run(before + BARRIER + after + DONE, **wide)
    finds("race", before + DONE + after + DONE, "since the last barrier", **wide)


def test_a_barrier_is_no_wait():
    """What is under way when a wave passes it may happen after: what others read, or what they overwrite."""
    finds("race", WRITE + "s_barrier\n" + CROSS_READ, **SHARED)
    finds("race", WRITE + BARRIER + READ + "s_barrier\n" + CROSS_WRITE, **SHARED)
    run(WRITE + BARRIER + READ + BARRIER + CROSS_WRITE, **SHARED)


def test_waves_may_write_the_same_value_to_the_same_place():
    same = "ds_write_b32 v6, v5\n"
    run("ds_write_b32 v0, v5\n" + DONE + same + BARRIER + READ, **SHARED)


def test_halves_of_a_word_are_places_of_their_own():
    """Only where the kernel has accesses so narrow: else words are watched as a whole."""
    halves = {"v": SHARED["v"] | {8: LANE * 4 + 2 * WAVE}, "waves": 2}
    run("ds_write_b16 v8, v4\n" + BARRIER + "ds_read_u16 v3, v8\n", **halves)
    finds(
        "race",
        "ds_write_b16 v8, v4\n" + DONE + "ds_read_b32 v3, v0\n",
        **(halves | {"v": halves["v"] | {0: LANE * 4}}),
    )


def test_lds_that_was_never_written():
    finds("undefined LDS", READ, "LDS byte 0")
    finds("undefined LDS", WRITE + DONE + "ds_read_b64 v[6:7], v0", v={0: LANE * 8, 4: LANE})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bounds", "ds_write_b32 v0, v4 offset:772"),
        ("bounds", "ds_read_b128 v[8:11], v0 offset:1012"),
        ("alignment", "ds_write_b64 v0, v[4:5]"),
        ("alignment", "ds_write_b32 v0, v4 offset:2"),
        ("two stores", "ds_write_b32 v5, v4"),
        ("two stores", "global_store_dword v5, v4, s[0:1]"),
        ("two stores", "global_store_short v5, v4, s[0:1]"),
        ("bounds", "global_store_dword v0, v4, s[0:1] offset:1600"),
    ],
)
def test_places(kind, text):
    finds(kind, text, v={0: LANE * 4, 4: LANE, 5: LANE // 2 * 4})


def test_lanes_of_several_waves_may_not_store_to_one_place():
    finds("two stores", "global_store_dword v5, v4, s[0:1]", v={4: 1, 5: LANE * 4}, waves=2)
    run(
        "global_store_dword v5, v4, s[0:1]\nglobal_store_dword v5, v4, s[0:1]", v={4: 1, 5: LANE * 4}
    )  # the same lane


def test_a_fault_says_where():
    """The line, the instruction, and the wave and lane."""
    finds("undefined LDS", "s_nop 0\n" + READ, r"workgroup 0, wave 0, lane 0\); line 2: ds_read_b32 v3, v0")
