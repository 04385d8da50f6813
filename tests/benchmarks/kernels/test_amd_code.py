"""Readings of AMD's assembly, on small texts: loops, barriers, copies of accumulators, loads, clocks."""

import textwrap

import pytest

from benchmarks.kernels.amd_code import AmdCode, matrix_clocks, vector_clocks
from depthfuse.devices import DEVICES


def code(text: str) -> AmdCode:
    return AmdCode(textwrap.dedent(text).strip("\n"))


def loop(body: str, before: str = "", after: str = "") -> AmdCode:
    """One loop around `body`."""
    parts = [before, ".LBB0_1:", body, "    s_cbranch_scc1 .LBB0_1", after, "    s_endpgm"]
    return code("\n".join(part for part in parts if part))


def test_loops_are_the_lines_that_control_comes_back_to():
    found = code(
        """
            s_cbranch_scc0 .LBB0_3
        .LBB0_1:
            ds_read_u16 v1
        .LBB0_2:
            s_cbranch_vccz .LBB0_2
            s_cbranch_scc1 .LBB0_1
        .LBB0_3:
            ds_read_u16 v2
        """
    )
    assert found.flow.lines_in_loops() == [False, True, True, True, True, True, False, False]
    assert found.in_loops("ds_read_u16") == [2]


def test_an_exit_that_stands_inside_a_loop_is_not_part_of_it():
    found = code(
        """
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
    )
    assert found.flow.lines_in_loops() == [True, True, True, False, False, False, True, True, True]


DRAIN = "    s_waitcnt vmcnt(0) lgkmcnt(0)\n    s_barrier"


@pytest.mark.parametrize(
    ("body", "barriers", "drained"),
    [
        (DRAIN, 1, 1),
        ("    s_waitcnt vmcnt(0)\n    s_nop 0\n    ; comment\n    s_barrier", 1, 1),
        ("    s_waitcnt vmcnt(0)\n    s_waitcnt lgkmcnt(0)\n    s_barrier", 1, 1),
        ("    s_waitcnt lgkmcnt(0)\n    s_barrier", 1, 0),
        ("    s_waitcnt vmcnt(10) lgkmcnt(0)\n    s_barrier", 1, 0),
        ("    s_barrier", 1, 0),
        # awaited for the sake of what is stored, and the next load is under way
        (
            "    s_waitcnt vmcnt(0)\n    ds_write_b128 v1, v[2:5]\n    buffer_load_dwordx4 v[2:5]\n    s_barrier",
            1,
            0,
        ),
        (DRAIN + "\n    s_barrier", 2, 1),  # the wait belongs to the first
        (DRAIN + "\n    v_add_u32 v1, v1, v2\n" + DRAIN, 2, 2),
        ("    s_waitcnt vmcnt(0)\n.LBB0_9:\n    s_barrier", 1, 0),  # control may come by another way
    ],
)
def test_barriers_that_wait_for_all_global_loads(body, barriers, drained):
    found = loop(body)
    assert (found.barriers(), found.drained_barriers()) == (barriers, drained)


def test_barriers_outside_loops_do_not_count():
    found = loop("    s_waitcnt lgkmcnt(0)\n    s_barrier", before=DRAIN, after=DRAIN)
    assert (found.barriers(), found.drained_barriers()) == (1, 0)


MFMA = "    v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[0:15]"
COPY = "    v_accvgpr_read_b32 v65, a48\n    v_accvgpr_write_b32 a0, v65\n    v_accvgpr_mov_b32 a1, a2"


def test_copies_of_accumulators_count_in_loops_with_matrix_instructions():
    assert loop(MFMA, before=COPY, after=COPY).accumulator_copies() == 0
    assert loop(COPY + "\n" + MFMA, before=COPY, after=COPY).accumulator_copies() == 3
    assert loop(COPY).accumulator_copies() == 0


def test_copies_around_an_inner_loop_do_not_count():
    """A tap's sums may be handed over between its steps' loop and the next."""
    nest = """
        .LBB0_1:
            v_accvgpr_read_b32 v65, a48
        .LBB0_2:
            v_accvgpr_write_b32 a0, v65
            v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[0:15]
            s_cbranch_scc1 .LBB0_2
            v_accvgpr_read_b32 v65, a48
            s_cbranch_vccz .LBB0_1
            s_endpgm
        """
    assert code(nest).accumulator_copies() == 1
    # without a matrix instruction in it, the inner loop is part of the outer
    outer = nest.replace("v_mfma", "v_fma").replace(
        ".LBB0_1:", ".LBB0_1:\n            v_mfma_f32_4x4x4f16 a[0:3]"
    )
    assert code(outer).accumulator_copies() == 3


def test_a_loop_that_is_entered_in_its_middle():
    """As LLVM rotates them: the label that the last jump goes to is not the header."""
    found = code(
        """
            s_branch .LBB0_2
        .LBB0_1:
            s_cbranch_scc0 .LBB0_4
        .LBB0_2:
            v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[0:15]
            s_cbranch_scc1 .LBB0_1
            v_mov_b32 v1, v2
            s_branch .LBB0_1
        .LBB0_4:
            s_endpgm
        """
    )
    (blocks,) = found.matrix_loops()
    paths = [found.flow.lines(path) for path in found.flow.paths(blocks)]
    assert sorted(paths) == [[3, 4, 5, 1, 2], [3, 4, 5, 6, 7, 1, 2]]
    assert sorted(found.flow.lines(blocks)) == [1, 2, 3, 4, 5, 6, 7]


def test_clocks_of_a_loop():
    vector = "    v_add_u32 v1, v1, v2\n    v_exp_f32_e32 v1, v2\n    s_add_i32 s0, s0, 1\n    ds_read_b128 v[0:3], v4"
    found = loop("\n".join([vector, MFMA, MFMA]), before=vector + "\n" + MFMA)
    assert found.loop_clocks("gfx908") == (4 + 16, 2 * 64)
    assert found.loop_clocks("gfx942") == (4 + 16, 2 * 32)
    assert loop(vector).loop_clocks("gfx908") == (0, 0)


def test_clocks_are_those_of_the_heaviest_loop():
    light = ".LBB0_5:\n    v_mfma_f32_16x16x16f16 a[0:3]\n    v_mov_b32 v1, v2\n    s_cbranch_scc1 .LBB0_5"
    for found in (loop(MFMA, before=light), loop(MFMA, after=light)):
        assert found.loop_clocks("gfx908") == (0, 64)


@pytest.mark.parametrize(
    ("opcode", "clocks"),
    [
        ("v_fma_f32", 4),
        ("v_accvgpr_read_b32", 4),
        ("v_rcp_iflag_f32_e32", 16),
        ("v_rsq_f32_e32", 16),
        ("v_sqrt_f32_e32", 16),
        ("v_log_f32_e32", 16),
        ("v_mul_lo_u32", 16),
        ("v_mul_lo_u16_e32", 4),
        ("v_mad_u64_u32", 16),
        ("v_mfma_f32_32x32x8f16", 0),
        ("s_mul_i32", 0),
        ("buffer_load_dword", 0),
    ],
)
def test_vector_clocks(opcode, clocks):
    assert vector_clocks(opcode) == clocks


@pytest.mark.parametrize(
    ("arch", "opcode", "clocks"),
    [
        ("gfx908", "v_mfma_f32_32x32x8f16", 64),
        ("gfx908", "v_mfma_f32_16x16x16f16", 32),
        ("gfx908", "v_mfma_f32_4x4x4f16", 8),
        ("gfx908", "v_mfma_f32_32x32x4bf16", 64),
        ("gfx908", "v_mfma_f32_16x16x8bf16", 32),
        ("gfx908", "v_mfma_f32_16x16x4f32", 32),
        ("gfx90a", "v_mfma_f32_32x32x8bf16_1k", 64),
        ("gfx942", "v_mfma_f32_16x16x16_f16", 16),
        ("gfx942", "v_mfma_f32_32x32x4_2b_f16", 64),
        ("gfx942", "v_mfma_f32_32x32x2_f32", 64),
        ("gfx942", "ds_read_b128", 0),
    ],
)
def test_matrix_clocks(arch, opcode, clocks):
    assert matrix_clocks(opcode, arch) == clocks


def test_matrix_clocks_agree_with_the_peaks_of_the_cards():
    """2 x 32 x 32 x depth operations in so many clocks: the ratios of the dtypes' rates, card by card."""
    fp16, bf16, fp32 = ("32x32x8f16", 8), ("32x32x4bf16", 4), ("32x32x2f32", 2)
    instructions = {
        "gfx908": (fp16, bf16, fp32),
        "gfx90a": (fp16, ("32x32x8bf16_1k", 8), fp32),
        "gfx942": (("32x32x8_f16", 8), ("32x32x8_bf16", 8), ("32x32x2_f32", 2)),
    }
    for arch, found in instructions.items():
        rates = [depth / matrix_clocks(f"v_mfma_f32_{name}", arch) for name, depth in found]
        device = DEVICES[arch]
        peaks = [device.fp16_tflops, device.bf16_tflops, device.fp32_tflops]
        for rate, peak in zip(rates, peaks, strict=True):
            assert rate / rates[0] == pytest.approx(peak / peaks[0], rel=0.01)


def test_an_unknown_matrix_instruction_is_named():
    with pytest.raises(ValueError, match="v_mfma_f32_64x64x1f16 are unknown"):
        matrix_clocks("v_mfma_f32_64x64x1f16", "gfx908")


def test_global_loads_in_loops_by_width():
    body = ["    buffer_load_dwordx4 v[0:3]", "    buffer_load_ushort v4", "    buffer_load_dwordx4 v[5:8]"]
    body.append("    ds_read_b128 v[0:3]")
    found = loop("\n".join(body), before="    buffer_load_dwordx2 v[0:1]", after="    global_load_dword v1")
    assert found.global_loads() == "buffer_load_dwordx4 x2 buffer_load_ushort x1"
