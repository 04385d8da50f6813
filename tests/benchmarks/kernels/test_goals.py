"""Faults and worries: each is found, alone, by the reading that it is about."""

import pytest

from benchmarks.kernels.goals import WORRIES, faults, worries
from benchmarks.kernels.resources import Resources
from depthfuse.kernels.launch import TARGETS

GOOD = Resources(
    registers=64,
    accumulators=64,
    spills=0,
    private_bytes=0,
    shared_bytes=32768,
    workgroups=2,
    occupancy=2,
    matrix="v_mfma_f32_32x32x8f16 x24",
    shared_reads="ds_read_b128 x22",
    narrow_reads_in_loop=0,
    global_loads="buffer_load_dwordx4 x4 buffer_load_dword x1",
    barriers=2,
    drained_barriers=0,
    accumulator_copies=0,
    vector_clocks=512,
    matrix_clocks=512,
)
GFX908 = TARGETS["gfx908"]


def changed(**values) -> Resources:
    return Resources(**(vars(GOOD) | values))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 1}, "spills"),
        ({"private_bytes": 16}, "private_memory"),
        ({"shared_bytes": 65537}, "shared_memory"),
        ({"narrow_reads_in_loop": 4}, "narrow_reads"),
        ({"matrix": ""}, "no_matrix_instructions"),
        ({"occupancy": 1}, "occupancy"),
    ],
)
def test_each_fault_is_found(change, fault):
    assert faults(GOOD, "conv2d_kernel", "fp16", GFX908) == []
    assert faults(changed(**change), "conv2d_kernel", "fp16", GFX908) == [fault]


@pytest.mark.parametrize(
    ("change", "worry"),
    [
        ({"drained_barriers": 1}, "drained_barriers"),
        ({"accumulator_copies": 1}, "accumulator_copies"),
        ({"vector_clocks": 516}, "vector_bound"),
        ({"global_loads": "buffer_load_dwordx4 x4 buffer_load_ushort x1"}, "narrow_loads"),
        ({"global_loads": "buffer_load_short_d16_hi x1"}, "narrow_loads"),
        ({"global_loads": "global_load_ubyte x1"}, "narrow_loads"),
        ({"global_loads": "LDG.E.128 x1 LDG.E.U16 x2"}, "narrow_loads"),
        ({"global_loads": "LDG.E.U8.CONSTANT x2"}, "narrow_loads"),
        ({"workgroups": 1}, "one_workgroup"),
    ],
)
def test_each_worry_is_found(change, worry):
    assert worries(GOOD, "conv2d_kernel", 120, GFX908) == []
    assert worries(changed(**change), "conv2d_kernel", 120, GFX908) == [worry]
    assert worry in WORRIES


def test_few_programs_are_fewer_than_compute_units():
    assert worries(GOOD, "conv2d_kernel", 119, GFX908) == ["few_programs"]
    assert worries(GOOD, "conv2d_kernel", 120, TARGETS["sm_90"]) == ["few_programs"]


@pytest.mark.parametrize(
    "loads", ["LDG.E.64 x1", "LDG.E x1", "LDGSTS.E.BYPASS.128 x4", "buffer_load_dwordx2 x1", ""]
)
def test_loads_of_whole_words_are_no_worry(loads):
    assert worries(changed(global_loads=loads), "conv2d_kernel", 120, GFX908) == []


def test_kernels_without_a_product_are_bound_by_neither_unit():
    slow = changed(vector_clocks=9999, global_loads="buffer_load_ushort x1")
    assert worries(slow, "depthwise_kernel", 120, GFX908) == []
    assert (
        worries(changed(vector_clocks=9999, matrix_clocks=0), "conv2d_kernel", 120, GFX908) == []
    )  # no loop
