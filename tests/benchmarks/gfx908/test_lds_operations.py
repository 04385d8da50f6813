"""LDS instructions and those that cross lanes: addresses, widths, and which lane's value arrives where."""

import numpy as np
import pytest
from gfx908_snippets import execute, words

from benchmarks.gfx908.faults import Unsupported

LANE = np.arange(64, dtype=np.uint32)
DONE = "\ns_waitcnt lgkmcnt(0)\n"


def test_widths_and_offsets():
    state = execute(
        f"ds_write_b128 v0, v[4:7] offset:16{DONE}ds_read_b32 v8, v1 offset:24\nds_read_b64 v[10:11], v1 offset:16\n"
        f"ds_read_b128 v[12:15], v1 offset:16{DONE}",
        v={0: LANE * 16, 1: (63 - LANE) * 16, 4: LANE, 5: LANE + 100, 6: LANE + 200, 7: LANE + 300},
        lds=2048,
    )
    mirror = 63 - LANE
    assert (state.v[8, 0] == mirror + 200).all()
    assert (state.v[10:12, 0] == [mirror, mirror + 100]).all()
    assert (state.v[12:16, 0] == [mirror + n for n in (0, 100, 200, 300)]).all()


def test_pairs_have_offsets_in_elements_or_in_64_of_them():
    state = execute(
        f"ds_write2_b32 v0, v4, v5 offset1:64{DONE}ds_read2_b32 v[6:7], v0 offset0:64{DONE}"
        f"ds_write2st64_b64 v1, v[4:5], v[2:3] offset0:1 offset1:2{DONE}"
        f"ds_read2st64_b64 v[8:11], v1 offset0:2 offset1:1{DONE}ds_read2_b64 v[12:15], v1 offset0:64 offset1:128{DONE}"
        f"ds_write2_b64 v1, v[2:3], v[4:5] offset0:192 offset1:0{DONE}ds_read2st64_b32 v[16:17], v0 offset1:1{DONE}"
        f"ds_read_b64 v[18:19], v1 offset:1536{DONE}ds_write2st64_b32 v0, v5, v4 offset1:1{DONE}"
        f"ds_read_b32 v20, v0{DONE}",
        v={0: LANE * 4, 1: LANE * 8, 2: LANE + 20, 3: LANE + 30, 4: LANE + 40, 5: LANE + 50},
        lds=4096,
    )
    assert (state.v[6:8, 0] == [LANE + 50, LANE + 40]).all()
    assert (state.v[8:12, 0] == [LANE + 20, LANE + 30, LANE + 40, LANE + 50]).all()
    assert (state.v[12:16, 0] == [LANE + 40, LANE + 50, LANE + 20, LANE + 30]).all()
    assert (state.v[16, 0] == np.where(LANE % 2, LANE // 2 + 50, LANE // 2 + 40)).all()
    assert (state.v[18:20, 0] == [LANE + 20, LANE + 30]).all()
    assert (state.v[20, 0] == LANE + 50).all()


def test_halves():
    state = execute(
        f"ds_write_b16 v0, v1\nds_write_b16_d16_hi v0, v1 offset:2{DONE}"
        f"ds_read_u16 v2, v0 offset:2\nds_read_b32 v3, v0{DONE}",
        v={0: LANE * 4, 1: 0xABCD1234, 2: 0xFFFFFFFF},
        lds=256,
    )
    assert (state.v[2] == 0xABCD).all() and (state.v[3] == 0xABCD1234).all()


def test_lanes_that_are_not_active_touch_nothing():
    state = execute(
        f"ds_write_b32 v0, v1{DONE}s_mov_b64 exec, s[0:1]\nds_read_b32 v2, v0{DONE}",
        v={0: np.where(LANE < 2, LANE * 4, 0xFFFFFFF0), 1: LANE + 5, 2: 9},
        s={0: 2, 1: 0},
        exec_mask=3,
        lds=64,
    )
    assert list(state.v[2, 0, :3]) == [9, 6, 9]


@pytest.mark.parametrize("mask", [2**64 - 1, 0xFFFF_FFFF_0000_FFF0])
def test_a_permutation_by_address_reads_zero_of_inactive_lanes(mask):
    wanted = (LANE * 7 + 3) % 64
    state = execute(
        f"ds_bpermute_b32 v1, v0, v2{DONE}", v={0: wanted * 4 + 256, 1: 1, 2: LANE + 10}, exec_mask=mask
    )
    for lane in range(64):
        if not mask >> lane & 1:
            assert state.v[1, 0, lane] == 1
        else:
            assert state.v[1, 0, lane] == (wanted[lane] + 10 if mask >> int(wanted[lane]) & 1 else 0)


def test_swizzles_stay_within_32_lanes():
    state = execute(
        f"ds_swizzle_b32 v1, v0 offset:swizzle(SWAP,16)\nds_swizzle_b32 v2, v0 offset:0x0c15{DONE}",
        v={0: LANE},
    )
    assert (state.v[1, 0] == LANE ^ 16).all()
    keep, force, flip = 0x15, 0, 3
    assert (state.v[2, 0] == (LANE & 32 | ((LANE & keep | force) ^ flip))).all()
    with pytest.raises(Unsupported, match="the pattern 0x8000"):
        execute("ds_swizzle_b32 v1, v0 offset:0x8000", v={0: words(0)})
