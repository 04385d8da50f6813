"""Depthwise then 1x1: exact on integers, within its error bound on reals, blind to what lies outside."""

import pytest
import torch

from depthfuse.kernels import depthwise_pointwise as module
from depthfuse.kernels.arguments import Tail, TwoLayers, Window
from depthfuse.kernels.depthwise import pack_weight
from depthfuse.kernels.depthwise_pointwise import DepthwisePointwiseConfig, depthwise_pointwise
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])

# batch, channels, (height, width), outputs, kernel, stride, padding, dilation
CASES = {
    "7x7": (2, 40, (7, 6), 48, (7, 7), (1, 1), (3, 3), (1, 1)),
    "3x3": (1, 33, (5, 7), 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3_s2": (3, 16, (7, 8), 24, (3, 3), (2, 2), (1, 1), (1, 1)),
    "5x5_no_padding": (1, 8, (9, 9), 9, (5, 5), (1, 1), (0, 0), (1, 1)),
    "dilated": (1, 16, (7, 7), 16, (3, 3), (1, 1), (2, 2), (2, 2)),
    "asymmetric": (1, 16, (7, 6), 8, (1, 5), (2, 1), (0, 2), (1, 1)),
    "wide": (1, 64, (3, 3), 256, (3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1_image": (3, 8, (1, 1), 3, (7, 7), (1, 1), (3, 3), (1, 1)),
    "one_channel": (1, 1, (4, 4), 1, (3, 3), (1, 1), (1, 1), (1, 1)),
}


def operands(case, dtype, device, integers):
    n, c, image, k, kernel, stride, padding, dilation = case

    def sample(*shape):
        if integers:  # sparse, so that sums stay exact in float16 between the layers
            return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.5)).to(device, dtype)
        return torch.randn(shape).to(device, dtype)

    x = sample(n, c, *image).contiguous(memory_format=torch.channels_last)
    inner = [sample(c, 1, *kernel), sample(c), sample(k, c, 1, 1)]
    window = Window(stride, padding, dilation)
    shape = (n, k, *window.output_size(image, kernel))
    residual = sample(*shape).contiguous(memory_format=torch.channels_last)
    tail = [sample(k), residual, sample(k), sample(k)]
    return guarded(x), TwoLayers(*map(guarded, inner)), [guarded(t) for t in tail], window


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, weights, tail, window = operands(case, dtype, device, integers=True)
    tail = Tail(*tail, "relu")
    y = depthwise_pointwise(x, weights, tail, window, act_inner="relu6")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, oracle.depthwise_pointwise(x, weights, tail, window, "relu6").value.to(dtype))


@pytest.mark.parametrize("act", ["none", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound(dtype, act, device):
    x, weights, tail, window = operands(CASES["7x7"], dtype, device, integers=False)
    tail = Tail(*tail, "gelu")
    y = depthwise_pointwise(x, weights, tail, window, act_inner=act)
    assert_within(y, *oracle.depthwise_pointwise(x, weights, tail, window, act, sums=torch.float32))


@pytest.mark.parametrize("patch_w", [1, 2, 8])
def test_any_patch_and_a_packed_weight_are_exact(patch_w, device):
    x, weights, tail, window = operands(CASES["3x3_s2"], torch.float32, device, integers=True)
    packed = weights._replace(w1=pack_weight(weights.w1))
    config = DepthwisePointwiseConfig(patch_w, 16, 32, 4)
    y = depthwise_pointwise(x, packed, Tail(*tail), window, config=config)
    assert torch.equal(y.double(), oracle.depthwise_pointwise(x, weights, Tail(*tail), window).value)


@pytest.mark.parametrize("present", [0, 1, 2, 4, 8])
def test_every_part_of_the_tail_is_optional(present, device):
    x, weights, tail, window = operands(CASES["3x3"], torch.float16, device, integers=True)
    tail = Tail(*(t if present >> i & 1 else None for i, t in enumerate(tail)))
    weights = weights._replace(b1=None)
    y = depthwise_pointwise(x, weights, tail, window)
    assert torch.equal(y, oracle.depthwise_pointwise(x, weights, tail, window).value.to(x.dtype))


def test_64_bit_offsets_and_repeated_runs_give_the_same_bits(device, monkeypatch):
    x, weights, tail, window = operands(CASES["7x7"], torch.float32, device, integers=False)
    tail = Tail(*tail)
    first = depthwise_pointwise(x, weights, tail, window)
    assert torch.equal(depthwise_pointwise(x, weights, tail, window), first)
    monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(depthwise_pointwise(x, weights, tail, window), first)


def test_empty_batch(device):
    x, weights, _, window = operands(CASES["3x3_s2"], torch.float16, device, integers=True)
    assert depthwise_pointwise(x[:0], weights, window=window).shape == (0, 24, 4, 4)


def test_a_bad_layout_is_named(device):
    x, weights, _, window = operands(CASES["3x3"], torch.float32, device, integers=True)
    with pytest.raises(ValueError, match="x .* expected channels_last"):
        depthwise_pointwise(x.contiguous(), weights, window=window)
    with pytest.raises(ValueError, match=r"w1 has strides .* expected contiguous or depthwise.pack_weight"):
        depthwise_pointwise(x, weights._replace(w1=weights.w1.transpose(2, 3)), window=window)
    with pytest.raises(ValueError, match=r"b1 .* has strides \[0\], expected contiguous"):
        depthwise_pointwise(x, weights._replace(b1=weights.b1[:1].expand(33)), window=window)
