"""Depthwise convolution: exact on integers, within its error bound on reals, blind to what lies outside."""

import pytest
import torch
import torch.nn.functional as F

from depthfuse.kernels import depthwise as module
from depthfuse.kernels.arguments import Tail, Window
from depthfuse.kernels.depthwise import DepthwiseConfig, depthwise_conv2d, pack_weight
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, assert_within, guarded

DTYPES = [torch.float16, torch.float32, torch.bfloat16]
# Triton's interpreter truncates to bfloat16 where compiled code rounds, which only integers do not show.
ROUNDED_DTYPES = DTYPES[:2] if INTERPRETED else DTYPES

# batch, channels, (height, width), kernel, stride, padding, dilation
CASES = {
    "3x3": (2, 33, (7, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3_s2": (2, 40, (7, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
    "5x5": (1, 24, (6, 7), (5, 5), (1, 1), (2, 2), (1, 1)),
    "5x5_s2": (1, 16, (9, 8), (5, 5), (2, 2), (2, 2), (1, 1)),
    "7x7": (1, 24, (7, 6), (7, 7), (1, 1), (3, 3), (1, 1)),
    "no_padding": (1, 16, (5, 6), (3, 3), (1, 1), (0, 0), (1, 1)),
    "dilated": (1, 16, (7, 7), (3, 3), (1, 1), (2, 2), (2, 2)),
    "dilated_5x5": (1, 8, (11, 9), (5, 5), (1, 1), (4, 4), (2, 2)),
    "asymmetric": (1, 16, (7, 6), (1, 7), (2, 1), (0, 3), (1, 1)),
    "even_kernel": (1, 8, (6, 6), (2, 4), (1, 1), (1, 2), (1, 1)),
    "stride_beyond_kernel": (1, 8, (7, 7), (2, 2), (3, 3), (0, 0), (1, 1)),
    "1x1_image": (3, 16, (1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1_kernel": (1, 8, (3, 3), (1, 1), (1, 1), (0, 0), (1, 1)),
    "one_channel": (1, 1, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
}


def operands(case, dtype, device, integers):
    n, c, image, kernel, stride, padding, dilation = case

    def sample(*shape):
        return (torch.randint(-3, 4, shape) if integers else torch.randn(shape)).to(device, dtype)

    x = sample(n, c, *image).contiguous(memory_format=torch.channels_last)
    weight = sample(c, 1, *kernel)
    window = Window(stride, padding, dilation, c)
    shape = F.conv2d(x.double(), weight.double(), None, *window).shape
    residual = sample(*shape).contiguous(memory_format=torch.channels_last)
    tail = (sample(c), residual, sample(c), sample(c))
    return guarded(x), guarded(weight), [guarded(t) for t in tail], window


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, weight, tail, window = operands(case, dtype, device, integers=True)
    tail = Tail(*tail, "relu")
    y = depthwise_conv2d(x, weight, tail, window)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, oracle.conv2d(x, weight, tail, window).value.to(dtype))


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES, ids=str)
@pytest.mark.parametrize("act", ACT)
def test_error_bound(act, dtype, device):
    x, weight, tail, window = operands(CASES["3x3"], dtype, device, integers=False)
    tail = Tail(*tail, act)
    y = depthwise_conv2d(x, weight, tail, window)
    assert_within(y, *oracle.conv2d(x, weight, tail, window, sums=torch.float32))


@pytest.mark.parametrize("case", ["3x3_s2", "7x7"])
def test_packed_weight_gives_the_same_bits(case, device):
    x, weight, tail, window = operands(CASES[case], torch.float16, device, integers=False)
    packed = pack_weight(weight)
    assert torch.equal(packed, weight)
    assert packed.stride(0) == 1
    expected = depthwise_conv2d(x, weight, Tail(*tail), window)
    assert torch.equal(depthwise_conv2d(x, packed, Tail(*tail), window), expected)


@pytest.mark.parametrize("patch", [(1, 1), (1, 7), (3, 2)])
@pytest.mark.parametrize("case", ["3x3_s2", "dilated"])
def test_any_patch_is_exact(case, patch, device):
    x, weight, tail, window = operands(CASES[case], torch.float32, device, integers=True)
    config = DepthwiseConfig(*patch, patches=8, block_c=32, num_warps=1)
    y = depthwise_conv2d(x, weight, Tail(*tail), window, config=config)
    assert torch.equal(y.double(), oracle.conv2d(x, weight, Tail(*tail), window).value)


def test_64_bit_offsets_give_the_same_bits(device, monkeypatch):
    x, weight, tail, window = operands(CASES["3x3_s2"], torch.float32, device, integers=False)
    narrow = depthwise_conv2d(x, weight, Tail(*tail), window)
    monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(depthwise_conv2d(x, weight, Tail(*tail), window), narrow)


def test_empty_batch(device):
    x, weight, tail, window = operands(CASES["3x3_s2"], torch.float16, device, integers=True)
    assert depthwise_conv2d(x[:0], weight, Tail(tail[0]), window).shape == (0, 40, 4, 4)


def test_same_bits_from_run_to_run(device):
    x, weight, tail, window = operands(CASES["5x5"], torch.float16, device, integers=False)
    first = depthwise_conv2d(x, weight, Tail(*tail, "silu"), window)
    assert torch.equal(depthwise_conv2d(x, weight, Tail(*tail, "silu"), window), first)


def test_bad_layout_is_named(device):
    weight = torch.zeros(4, 1, 3, 3, device=device)
    with pytest.raises(ValueError, match=r"x \[1, 4, 5, 5\] has strides .* expected channels_last"):
        depthwise_conv2d(torch.zeros(1, 4, 5, 5, device=device), weight)
    x = torch.zeros(1, 4, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    with pytest.raises(
        ValueError, match=r"weight has strides .* expected contiguous or depthwise.pack_weight"
    ):
        depthwise_conv2d(x, weight.transpose(2, 3))


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES, ids=str)
@pytest.mark.parametrize("case", ["3x3", "7x7"])
def test_layer_norm_after_the_convolution(case, dtype, device):
    x, weight, tail, window = operands(CASES[case], dtype, device, integers=False)
    y = depthwise_conv2d(x, weight, Tail(*tail), window, norm_eps=1e-6)
    assert_within(y, *oracle.conv2d(x, weight, Tail(*tail), window, 1e-6, sums=torch.float32))
