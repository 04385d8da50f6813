"""What workgroups hand to each other through memory: the last to count itself in may read what others have stored."""

import numpy as np
import pytest

from benchmarks.gfx908.assembly import parse
from benchmarks.gfx908.faults import Fault
from benchmarks.gfx908.machine import Program
from benchmarks.gfx908.memory import Memory
from benchmarks.gfx908.running import ARGUMENTS, run

# Two waves a workgroup. Each lane stores 1000 * workgroup + lane; the first wave counts; whoever comes last sums up.
KERNEL = """	s_load_dwordx4 s[0:3], s[4:5], 0x0
	s_load_dwordx2 s[8:9], s[4:5], 0x10
	s_mul_i32 s7, s6, 0x3e8
	v_add_u32_e32 v1, s7, v0
	s_lshl_b32 s7, s6, 9
	v_lshlrev_b32_e32 v2, 2, v0
	v_add_u32_e32 v3, s7, v2
	v_mov_b32_e32 v9, 0
	s_waitcnt lgkmcnt(0)
	global_store_dword v3, v1, s[0:1]
	s_waitcnt vmcnt(0)
	s_barrier
	v_mov_b32_e32 v4, 0
	v_mov_b32_e32 v5, 1
	v_cmp_eq_u32_e32 vcc, 0, v0
	s_and_saveexec_b64 s[10:11], vcc
	s_cbranch_execz .LBB0_1
	global_atomic_add v6, v4, v5, s[2:3] glc
	s_waitcnt vmcnt(0)
	buffer_wbinvl1_vol
	ds_write_b32 v4, v6
.LBB0_1:
	s_mov_b64 exec, s[10:11]
	s_waitcnt lgkmcnt(0)
	s_barrier
	ds_read_b32 v7, v4
	s_waitcnt lgkmcnt(0)
	v_readfirstlane_b32 s12, v7
	s_cmp_lg_u32 s12, 2
	s_cbranch_scc1 .LBB0_2
	global_load_dword v10, v2, s[0:1]
	global_load_dword v11, v2, s[0:1] offset:512
	global_load_dword v12, v2, s[0:1] offset:1024
	s_waitcnt vmcnt(0)
	v_add3_u32 v9, v10, v11, v12
	global_store_dword v2, v9, s[8:9]
.LBB0_2:
	s_endpgm
"""


def result(text: str, order: list[int]) -> np.ndarray:
    """What three workgroups, run in this order, leave in y."""
    kernel = parse(text, lds_bytes=16, waves=2)
    kernel.settings.update(
        user_sgpr_count=6,
        user_sgpr_private_segment_buffer=1,
        user_sgpr_kernarg_segment_ptr=1,
        system_sgpr_workgroup_id_x=1,
    )
    sizes = {"parts": 1536, "counters": 4, "y": 512, ARGUMENTS: 24}
    memory = Memory(
        {name: np.zeros(size, np.uint8) for name, size in sizes.items()}, frozenset({"parts", "y"})
    )
    addresses = np.array([memory.address(name) for name in ("parts", "counters", "y")], np.uint64)
    memory.contents(ARGUMENTS)[:] = addresses.view(np.uint8)
    run(Program(kernel), memory, (3, 1, 1), [(n, 0, 0) for n in order])
    return memory.contents("y").view(np.uint32)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_the_last_workgroup_sees_what_the_others_have_stored(order):
    assert (result(KERNEL, order) == 3000 + 3 * np.arange(128)).all()


def test_loads_past_the_first_cache_need_no_invalidation():
    text = KERNEL.replace("\tbuffer_wbinvl1_vol\n", "")
    for name in ("v10, v2, s[0:1]", "v11, v2, s[0:1] offset:512", "v12, v2, s[0:1] offset:1024"):
        text = text.replace(name, f"{name} glc")
    assert (result(text, [0, 1, 2]) == 3000 + 3 * np.arange(128)).all()


@pytest.mark.parametrize(
    ("kind", "gone", "detail"),
    [
        ("race", "\ts_waitcnt vmcnt(0)\n\ts_barrier\n", "on its way from another workgroup"),
        ("stale", "\tbuffer_wbinvl1_vol\n", "may hold an older copy of byte .* of parts"),
        ("race", "\ts_waitcnt lgkmcnt(0)\n\ts_barrier\n", "since the last barrier"),
    ],
)
def test_what_the_order_rests_on_is_missed(kind, gone, detail):
    assert gone in KERNEL
    kept = "\ts_barrier\n" if "vmcnt" in gone else "\ts_waitcnt lgkmcnt(0)\n" if "lgkmcnt" in gone else ""
    with pytest.raises(Fault, match=detail) as found:
        result(KERNEL.replace(gone, kept), [0, 1, 2])
    assert found.value.kind == kind
