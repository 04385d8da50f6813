"""Fused inverted residual: exact on integers, within its error bound on reals, zero padding between its layers."""

import pytest
import torch

from depthfuse.kernels import inverted_residual as module
from depthfuse.kernels.arguments import Tail, ThreeLayers
from depthfuse.kernels.depthwise import pack_weight
from depthfuse.kernels.inverted_residual import inverted_residual
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])

# batch, channels, (height, width), hidden, outputs, stride
CASES = {
    "skip": (2, 24, (5, 6), 48, 24, 1),
    "stride_2": (1, 16, (7, 8), 40, 24, 2),
    "odd_channels": (1, 7, (4, 3), 33, 9, 1),
    "wide": (1, 64, (3, 3), 32, 64, 1),
    "1x1_image": (3, 8, (1, 1), 16, 8, 2),
}


def operands(case, dtype, device, integers):
    n, c, image, hidden, k, stride = case

    def sample(*shape):
        if integers:  # sparse, so that sums stay exact in float16 between the layers
            return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).to(device, dtype)
        return torch.randn(shape).to(device, dtype)

    x = sample(n, c, *image).contiguous(memory_format=torch.channels_last)
    inner = [
        sample(hidden, c, 1, 1),
        sample(hidden),
        sample(hidden, 1, 3, 3),
        sample(hidden),
        sample(k, hidden, 1, 1),
    ]
    size = [(extent - 1) // stride + 1 for extent in image]
    residual = sample(n, k, *size).contiguous(memory_format=torch.channels_last)
    tail = [sample(k), residual, sample(k), sample(k)]
    return guarded(x), ThreeLayers(*map(guarded, inner)), [guarded(t) for t in tail]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, weights, tail = operands(case, dtype, device, integers=True)
    tail = Tail(*tail, "relu")
    y = inverted_residual(x, weights, tail, stride=case[-1])
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, oracle.inverted_residual(x, weights, tail, case[-1]).value.to(dtype))


@pytest.mark.parametrize("act", ["relu6", "silu", "hardswish"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound(dtype, act, device):
    x, weights, tail = operands(CASES["skip"], dtype, device, integers=False)
    y = inverted_residual(x, weights, Tail(*tail), act_inner=act)
    assert_within(y, *oracle.inverted_residual(x, weights, Tail(*tail), 1, act, sums=torch.float32))


def test_packed_depthwise_weight_gives_the_same_bits(device):
    x, weights, tail = operands(CASES["skip"], torch.float16, device, integers=False)
    expected = inverted_residual(x, weights, Tail(*tail))
    packed = weights._replace(w2=pack_weight(weights.w2))
    assert torch.equal(inverted_residual(x, packed, Tail(*tail)), expected)


def test_64_bit_offsets_give_the_same_bits(device, monkeypatch):
    x, weights, tail = operands(CASES["stride_2"], torch.float32, device, integers=False)
    narrow = inverted_residual(x, weights, Tail(*tail), stride=2)
    monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(inverted_residual(x, weights, Tail(*tail), stride=2), narrow)


def test_empty_batch_and_no_tail(device):
    x, weights, _ = operands(CASES["stride_2"], torch.float16, device, integers=True)
    assert inverted_residual(x[:0], weights, stride=2).shape == (0, 24, 4, 4)
    exact = oracle.inverted_residual(x, weights, stride=2).value
    assert torch.equal(inverted_residual(x, weights, stride=2), exact.to(x.dtype))


def test_a_bad_layout_is_named(device):
    x, weights, _ = operands(CASES["skip"], torch.float32, device, integers=True)
    with pytest.raises(ValueError, match="x .* expected channels_last"):
        inverted_residual(x.contiguous(), weights)
    with pytest.raises(ValueError, match=r"w2 has strides .* expected contiguous or depthwise.pack_weight"):
        inverted_residual(x, weights._replace(w2=weights.w2.transpose(2, 3)))
    with pytest.raises(ValueError, match=r"b2 .* has strides \[0\], expected contiguous"):
        inverted_residual(x, weights._replace(b2=weights.b2[:1].expand(48)))
