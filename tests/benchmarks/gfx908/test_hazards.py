"""Wait states between two instructions: one too few is found, the number that is asked for is not."""

import pytest

from benchmarks.gfx908 import hazards
from benchmarks.gfx908.assembly import parse
from benchmarks.gfx908.faults import Fault
from benchmarks.gfx908.machine import Program

LARGE, SMALL = (
    "v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[0:15]",
    "v_mfma_f32_16x16x4f32 a[0:3], v0, v1, a[4:7]",
)

# first, second, wait states that have to lie between
PAIRS = [
    ("v_mov_b32_e32 v0, 1", LARGE, 2),
    ("v_accvgpr_read_b32 v3, a20", LARGE, 2),
    ("v_mov_b32_e32 v0, 1", "v_accvgpr_write_b32 a0, v0", 2),
    (LARGE, "v_accvgpr_read_b32 v5, a15", 18),
    (SMALL, "v_accvgpr_read_b32 v5, a3", 10),
    (LARGE, "v_accvgpr_write_b32 a7, v9", 15),
    (SMALL, "v_accvgpr_write_b32 a1, v9", 7),
    (SMALL, "v_accvgpr_write_b32 a4, v9", 5),  # its addend
    ("v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[16:31]", "v_accvgpr_write_b32 a16, v9", 13),
    (LARGE, "v_mfma_f32_16x16x4f32 a[20:23], v0, v1, a[0:3]", 2),  # some of the registers
    (LARGE, "v_mfma_f32_16x16x4f32 a[20:23], a0, v1, a[20:23]", 4),
    ("v_accvgpr_write_b32 a0, v9", LARGE, 1),
    ("v_accvgpr_write_b32 a20, v9", "v_mfma_f32_16x16x4f32 a[0:3], a20, v1, a[0:3]", 3),
    ("v_accvgpr_write_b32 a0, v9", "v_accvgpr_read_b32 v1, a0", 3),
    ("v_accvgpr_read_b32 v1, a0", "ds_write_b32 v0, v1", 2),
    ("v_accvgpr_read_b32 v1, a0", "global_store_dword v1, v2, s[0:1]", 2),
    ("v_readfirstlane_b32 s8, v0", "buffer_load_dword v1, v2, s[8:11], 0 offen", 5),
    ("v_cmp_eq_u32_e64 s[2:3], 0, v0", "v_readlane_b32 s0, v1, s2", 4),
    ("v_mov_b32_e32 v0, 1", "v_add_u32_dpp v1, v0, v2 row_mirror row_mask:0xf bank_mask:0xf bound_ctrl:1", 2),
    ("v_div_scale_f32 v1, vcc, v2, v3, v2", "v_div_fmas_f32 v4, v5, v6, v7", 4),
    ("buffer_store_dwordx4 v[4:7], v0, s[0:3], 0 offen", "v_mov_b32_e32 v7, 0", 1),
    ("global_store_dwordx4 v0, v[4:7], s[0:1]", "v_mov_b32_e32 v4, 0", 1),
    # what needs none
    (LARGE, LARGE, 0),  # the same registers as addend
    (LARGE, "v_accvgpr_read_b32 v5, a16", 0),
    (LARGE, "v_mov_b32_e32 v0, 1", 0),
    ("v_mov_b32_e32 v0, 1", "v_add_u32_e32 v1, v0, v0", 0),
    ("s_mov_b32 s8, 0", "buffer_load_dword v1, v2, s[8:11], 0 offen", 0),
    ("v_div_scale_f32 v1, s[2:3], v2, v3, v2", "v_div_fmas_f32 v4, v5, v6, v7", 0),
    ("buffer_store_dwordx4 v[4:7], v0, s[0:3], s4 offen", "v_mov_b32_e32 v7, 0", 0),
    ("buffer_store_dwordx2 v[4:5], v0, s[0:3], 0 offen", "v_mov_b32_e32 v5, 0", 0),
]


def program(*lines: str) -> Program:
    text = "\n".join(line if line.endswith(":") else f"\t{line}" for line in (*lines, "s_endpgm"))
    return Program(parse(text + "\n", 0, 1))


def between(states: int) -> list[str]:
    """Lines that take so many wait states: nops of up to 8, and one other instruction."""
    lines = ["s_mov_b32 s20, 0"] if states else []
    left = states - len(lines)
    while left > 0:
        lines.append(f"s_nop {min(left, 8) - 1}")
        left -= min(left, 8)
    return lines


@pytest.mark.parametrize(("first", "second", "states"), PAIRS)
def test_distances(first, second, states):
    hazards.check(program(first, *between(states), second))
    for fewer in {0, states - 1} - {-1, states}:
        with pytest.raises(Fault, match=f"{fewer} wait states for .*, {states} needed") as found:
            hazards.check(program(first, *between(fewer), second))
        assert found.value.kind == "hazard" and first in str(found.value) and second in str(found.value)


def test_every_way_to_an_instruction_counts():
    """Around a loop, and past a branch that skips the nops."""
    read = "v_accvgpr_read_b32 v5, a0"
    with pytest.raises(Fault, match="3 wait states"):
        hazards.check(program(".LBB0_1:", "s_nop 0", "s_nop 0", read, LARGE, "s_cbranch_scc1 .LBB0_1"))
    skips = (LARGE, "s_cbranch_scc1 .LBB0_1", *between(17), ".LBB0_1:", read)
    with pytest.raises(Fault, match="1 wait states"):
        hazards.check(program(*skips))
    hazards.check(program(LARGE, "s_branch .LBB0_2", ".LBB0_1:", read, "s_endpgm", ".LBB0_2:", "s_nop 0"))
