"""Targets and what a launch is planned from: capabilities, and offsets that 32 bits do not hold."""

import pytest
import torch

from depthfuse.kernels import launch, linear, winograd
from depthfuse.kernels.arguments import Tail
from depthfuse.kernels.device.tile import _tiles, gemm_config
from depthfuse.kernels.launch import (
    DRAINED,
    IN_FLIGHT,
    INTERPRETER,
    REORDERED,
    TARGETS,
    Target,
    compiler_options,
    needs_wide_offsets,
    stand_in,
    target_of,
)
from depthfuse.kernels.tuning.space import stages_in_flight
from depthfuse.ops.backend import resolve_backend

HALF = torch.float16
BLACKWELL = Target("cuda", "sm_100", 148, 232448)


def test_capabilities_are_numbers():
    assert [TARGETS[name].capability for name in ("sm_80", "sm_90")] == [(8, 0), (9, 0)]
    assert BLACKWELL.capability == (10, 0) > TARGETS["sm_90"].capability
    assert Target("cuda", "sm_121", 48, 101376).capability == (12, 1)
    assert TARGETS["gfx942"].capability is None
    assert INTERPRETER.capability is None


def test_what_holds_from_hopper_on_holds_for_a_capability_of_two_digits():
    """As words "sm_100" comes before "sm_90"."""
    hopper, ampere, desktop = TARGETS["sm_90"], TARGETS["sm_80"], TARGETS["sm_120"]
    assert (
        winograd.config_for(HALF, BLACKWELL)
        == winograd.config_for(HALF, hopper)
        != winograd.config_for(HALF, ampere)
    )
    assert winograd.config_for(HALF, desktop) == winograd.config_for(HALF, ampere)
    assert _tiles(HALF, BLACKWELL) == _tiles(HALF, hopper)
    assert set(_tiles(HALF, desktop)) <= set(_tiles(HALF, ampere))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_stages_fit_the_shared_memory(target):
    for m, n, k in ((49, 512, 4608), (3136, 32, 64), (128 * 784, 128, 1152), (128 * 784, 1024, 1024)):
        for dtype in (torch.float16, torch.float32):
            config = gemm_config(m, n, k, 1, dtype, target)
            stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
            assert stage * stages_in_flight(config.num_stages, target) <= target.shared_bytes


def strided(shape, stride):
    """No memory behind it: nothing is read."""
    return torch.empty_strided(shape, stride, dtype=torch.float16, device="meta")


@pytest.mark.parametrize(
    ("shape", "stride", "wide"),
    [
        ((2**15, 2**16 - 1), (2**16, 1), False),  # the last offset is 2**31 - 2
        ((2**15, 2**16), (2**16, 1), True),
        ((3, 8), (2**30, 1), True),  # 24 elements, far apart
        ((2, 8), (2**31 - 9, 1), False),
        ((2, 9), (2**31 - 9, 1), True),
        ((1, 8), (2**40, 1), False),  # the stride of an axis of size 1 is never taken
        ((0, 8), (2**40, 1), False),
    ],
)
def test_offsets_count_the_strides_and_not_the_elements(shape, stride, wide):
    x = strided(shape, stride)
    assert needs_wide_offsets(x) is wide
    assert needs_wide_offsets(None, strided((2, 2), (2, 1)), x) is wide


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_rows_that_lie_far_apart_are_planned_with_64_bit_offsets(target):
    """The class tokens of a large batch of sequences: few elements of a large tensor."""
    weight, y = strided((48, 96), (96, 1)), strided((16384, 48), (48, 1))
    for tokens, wide in ((1369, True), (1365, False)):
        x = strided((16384, 96), (96 * tokens, 1))
        planned = linear.plan(x, weight, Tail(), y, norm_eps=None, config=None, target=target)
        assert planned.arguments["WIDE"] is wide


@pytest.mark.parametrize("overlap", [DRAINED, IN_FLIGHT, REORDERED])
def test_only_gfx908_is_told_what_to_overlap_and_only_by_a_compiler_that_can_be_told(overlap, monkeypatch):
    def attributes(target: Target) -> str | None:
        return compiler_options(target, 4, 2, overlap=overlap).get("llvm_fn_attrs")

    for able in (True, False):
        monkeypatch.setattr(launch, "_takes_attributes", lambda able=able: able)
        for arch, target in TARGETS.items():
            told = attributes(target)
            if arch != "gfx908" or overlap == DRAINED or not able:
                assert told is None
            else:
                assert "+back-off-barrier" in told
                assert ("iterative-ilp" in told) is (overlap == REORDERED)


def test_a_stand_in_gets_the_launches():
    """Planned for the card that it stands for, on tensors of any device; afterwards all is as before."""
    x, weight, got = torch.ones(3, 8), torch.ones(4, 8), []
    with stand_in(TARGETS["gfx908"], got.append):
        assert target_of(x) is TARGETS["gfx908"]
        assert resolve_backend("triton", "cpu")[0] == "triton"
        y = linear.linear(x, weight)
    (planned,) = got
    assert planned.arguments["y"] is y and planned.options["matrix_instr_nonkdim"]
    assert not launch.is_stood_in()
