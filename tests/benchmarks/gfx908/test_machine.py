"""Control flow of several waves, and how a kernel starts."""

import numpy as np
import pytest
from gfx908_snippets import VCC, execute

from benchmarks.gfx908.assembly import Argument, parse, registers
from benchmarks.gfx908.faults import Fault, Unsupported
from benchmarks.gfx908.machine import Machine, Program
from benchmarks.gfx908.memory import Memory
from benchmarks.gfx908.running import ARGUMENTS, argument_segment, hidden_values, run, start

WAVE = np.arange(4)


def test_waves_that_branch_differently_each_go_their_way():
    """Wave n adds n times; then all store what they have, at one barrier."""
    memory = Memory({"y": np.zeros(4 * 256, np.uint8)}, frozenset({"y"}))
    execute(
        """v_readfirstlane_b32 s4, v0
        s_mov_b32 s5, 0
        s_cmp_eq_u32 s4, 0
        s_cbranch_scc1 .LBB0_2
        .LBB0_1:
        s_addk_i32 s5, 0x64
        s_sub_i32 s4, s4, 1
        s_cmp_lg_u32 s4, 0
        s_cbranch_scc1 .LBB0_1
        .LBB0_2:
        s_barrier
        v_mov_b32_e32 v1, s5
        global_store_dword v2, v1, s[0:1]""",
        v={0: np.repeat(WAVE[:, None], 64, 1), 2: (WAVE[:, None] * 64 + np.arange(64)) * 4},
        waves=4,
        memory=memory,
        address={0: "y"},
    )
    assert (memory.contents("y").view(np.uint32).reshape(4, 64) == WAVE[:, None] * 100).all()


@pytest.mark.parametrize(
    ("branch", "taken"),
    [("execz", False), ("execnz", True), ("vccz", True), ("vccnz", False), ("scc0", False), ("scc1", True)],
)
def test_branches(branch, taken):
    text = f"s_mov_b32 s0, 1\ns_cbranch_{branch} .LBB0_1\ns_mov_b32 s0, 2\n.LBB0_1:\ns_mov_b32 s1, 0"
    assert execute(text, s={VCC: 0, VCC + 1: 0}, scc=True).s[0, 0] == (1 if taken else 2)


KERNEL = """
	.text
kernel:                                 ; @kernel
	.loc	1 90 0
	s_load_dword s0, s[4:5], 0x8            ; comment
	s_load_dwordx2 s[2:3], s[4:5], 0x0
	s_lshl_b32 s1, s7, 8
	s_add_i32 s6, s6, s1
	s_lshl_b32 s6, s6, 7
	v_add_u32_e32 v0, s6, v0
	v_lshlrev_b32_e32 v1, 2, v0
	s_waitcnt lgkmcnt(0)
	v_mul_lo_u32 v0, v0, s0
	global_store_dword v1, v0, s[2:3]
	s_endpgm
	.amdhsa_kernel kernel
		.amdhsa_user_sgpr_count 6
		.amdhsa_user_sgpr_private_segment_buffer 1
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_system_sgpr_workgroup_id_x 1
		.amdhsa_system_sgpr_workgroup_id_y 1
		.amdhsa_float_denorm_mode_32 3
	.end_amdhsa_kernel
amdhsa.kernels:
  - .agpr_count:     0
    .args:
      - .address_space:  global
        .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .offset:         8
        .size:           4
        .value_kind:     by_value
"""


def test_a_kernel_starts_with_its_arguments_and_its_place_in_the_grid():
    """Two waves a workgroup; workgroup (x, y) is the 256 * y + x-th in this kernel's arithmetic."""
    kernel = parse(KERNEL, lds_bytes=0, waves=2)
    octets = np.zeros(4 * 128 * 259, np.uint8)
    memory = Memory({"y": octets, ARGUMENTS: argument_segment(kernel.arguments, [])}, frozenset({"y"}))
    values = [memory.address("y").to_bytes(8, "little"), (3).to_bytes(4, "little")]
    memory.contents(ARGUMENTS)[:] = argument_segment(kernel.arguments, values)
    run(Program(kernel), memory, (3, 2, 1))
    found = memory.contents("y").view(np.uint32).reshape(-1, 128)
    written = [0, 1, 2, 256, 257, 258]
    assert (found[written] == 3 * np.arange(128 * 259).reshape(-1, 128)[written]).all()
    assert not np.delete(found, written, 0).any()


def test_hidden_arguments_say_how_large_the_launch_is():
    arguments = [Argument(0, 4, "hidden_block_count_y"), Argument(4, 2, "hidden_group_size_x")]
    segment = argument_segment(arguments, [], hidden_values((5, 300, 1), waves=4, lds_bytes=0))
    assert list(segment) == [44, 1, 0, 0, 0, 1]


def test_what_is_not_modelled_is_refused():
    with pytest.raises(Unsupported, match="float_denorm_mode_32 0: only 3"):
        parse(KERNEL.replace("denorm_mode_32 3", "denorm_mode_32 0"), 0, 1)
    with pytest.raises(Unsupported, match="8 bytes was given 4"):
        argument_segment(parse(KERNEL, 0, 1).arguments, [b"1234"])
    with pytest.raises(Unsupported, match="hidden_printf_buffer"):
        argument_segment([Argument(0, 8, "hidden_printf_buffer")], [])
    with pytest.raises(Unsupported, match="line 1: s_branch .LBB0_9: no such label"):
        execute("s_branch .LBB0_9")


def test_operands_are_read():
    assert registers("v[3:6]").numbers == {3, 4, 5, 6} and registers("a7").numbers == {263}
    assert registers("vcc").numbers == {512 + 106, 512 + 107} and registers("0x10") is None
    (i,) = parse(
        "\tv_fma_mix_f32 v1, -v2, v3, |v4| op_sel:[0,0,1] op_sel_hi:[1,1,1] ; x\n", 0, 1
    ).instructions
    assert (i.opcode, i.operands) == ("v_fma_mix_f32", ("v1", "-v2", "v3", "|v4|"))
    assert i.modifiers == {"op_sel": "[0,0,1]", "op_sel_hi": "[1,1,1]"}
    (i,) = parse("\tds_swizzle_b32 v1, v0 offset:swizzle(SWAP,16)\n", 0, 1).instructions
    assert (i.operands, i.modifiers) == (("v1", "v0"), {"offset": "swizzle(SWAP,16)"})
    (i,) = parse("\tbuffer_load_dword v1, v0, s[4:7], 0 offen offset:4095 glc\n", 0, 1).instructions
    assert i.operands == ("v1", "v0", "s[4:7]", "0") and i.modifiers == {
        "offen": "",
        "offset": "4095",
        "glc": "",
    }


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        # wave 0 does not come to the barrier, and ends first; or last; or waits at another one
        ("s_cbranch_scc1 .LBB0_1\ns_barrier\n.LBB0_1:\ns_nop 0", "a wave ends while others wait"),
        ("s_cbranch_scc0 .LBB0_1\ns_endpgm\n.LBB0_1:\ns_barrier", "a wave waits for others that have ended"),
        ("s_cbranch_scc1 .LBB0_1\ns_barrier\ns_endpgm\n.LBB0_1:\ns_barrier", r"barriers of lines \[5, 8\]"),
    ],
)
def test_waves_that_do_not_meet_are_found(text, lines):
    prefix = "v_readfirstlane_b32 s4, v0\ns_cmp_eq_u32 s4, 0\ns_nop 0\n"
    with pytest.raises(Fault, match=lines) as found:
        execute(prefix + text, v={0: np.repeat(WAVE[:, None], 64, 1)}, waves=4)
    assert found.value.kind == "barrier"


def test_a_kernel_that_does_not_end_is_found():
    kernel = parse("\ts_nop 0\n.LBB0_1:\n\ts_branch .LBB0_1\n\ts_endpgm\n", 0, 1)
    machine = Machine(Program(kernel), Memory({}), 1, most_stretches=100)
    with pytest.raises(Fault, match="100 stretches") as found:
        machine.run(start(machine, [(0, 0, 0)], (1, 1, 1)))
    assert found.value.kind == "endless"


def test_workgroups_side_by_side_do_not_see_each_other():
    """Each workgroup's LDS is its own, and so are its barriers: the second's waves part, the first's do not."""
    kernel = parse(
        "\n".join(
            "\t" + line if not line.endswith(":") else line
            for line in """s_mov_b32 s0, s6
            v_mov_b32_e32 v2, s0
            v_lshlrev_b32_e32 v1, 2, v0
            ds_write_b32 v1, v2
            v_readfirstlane_b32 s2, v0
            s_and_b32 s2, s2, 64
            s_mul_i32 s2, s2, s0
            s_cmp_eq_u32 s2, 0
            s_cbranch_scc1 .LBB0_1
            s_nop 0
            .LBB0_1:
            s_waitcnt lgkmcnt(0)
            s_barrier
            v_xor_b32_e32 v1, 0x100, v1
            ds_read_b32 v3, v1
            s_waitcnt lgkmcnt(0)
            s_endpgm""".replace("            ", "").splitlines()
        ),
        lds_bytes=512,
        waves=2,
    )
    kernel.settings.update(user_sgpr_count=6, system_sgpr_workgroup_id_x=1)
    program = Program(kernel)
    machine = Machine(program, Memory({ARGUMENTS: np.zeros(8, np.uint8)}), 2)
    waves = start(machine, [(0, 0, 0), (1, 0, 0)], (2, 1, 1))
    machine.run(waves)
    assert list(machine.lds.epoch) == [1, 1]
    words = machine.lds.words[:256].reshape(2, 128)
    assert (words == [[0], [1]]).all()
