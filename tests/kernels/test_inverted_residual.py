"""Fused inverted residual: exact on integers, within its error bound on reals, zero padding between its layers."""

import pytest
import torch
import torch.nn.functional as F

from depthfuse.kernels import inverted_residual as module
from depthfuse.kernels.depthwise import pack_weight
from depthfuse.kernels.inverted_residual import inverted_residual
from depthfuse.kernels.launch import INTERPRETED
from tests.kernels.oracle import ACTIVATIONS, assert_within, finish, forward_error, guarded

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
    return guarded(x), [guarded(t) for t in inner], [guarded(t) for t in tail]


def layers(x, inner, stride, act, absolute=False):
    """The three layers in float64 up to the projection; `absolute`: of magnitudes, for the error bound."""
    x, w1, b1, w2, b2, w3 = (t.double().abs() if absolute else t.double() for t in (x, *inner))
    act = (lambda z: z) if absolute else ACTIVATIONS[act]
    expanded = act(F.conv2d(x, w1, b1))
    filtered = act(F.conv2d(expanded, w2, b2, stride, 1, groups=len(w2)))
    return F.conv2d(filtered, w3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, inner, tail = operands(case, dtype, device, integers=True)
    y = inverted_residual(x, *inner, *tail, stride=case[-1], act="relu")
    exact = finish(layers(x, inner, case[-1], "relu6"), *tail, "relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("act", ["relu6", "silu", "hardswish"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound(dtype, act, device):
    x, inner, tail = operands(CASES["skip"], dtype, device, integers=False)
    exact = finish(layers(x, inner, 1, act), *tail, "none")
    magnitude = layers(x, inner, 1, act, absolute=True)
    hidden, channels = inner[0].shape[:2]
    bound = forward_error(channels + 9 + hidden, 3 * magnitude, exact, *tail, dtype)
    # One more rounding: the filtered tensor is stored in the dtype of x before the projection.
    bound = bound + torch.finfo(dtype).eps * magnitude * tail[2].double().abs().view(-1, 1, 1)
    assert_within(inverted_residual(x, *inner, *tail, act_inner=act), exact, bound)


def test_packed_depthwise_weight_gives_the_same_bits(device):
    x, inner, tail = operands(CASES["skip"], torch.float16, device, integers=False)
    expected = inverted_residual(x, *inner, *tail)
    inner[2] = pack_weight(inner[2])
    assert torch.equal(inverted_residual(x, *inner, *tail), expected)


def test_64_bit_offsets_give_the_same_bits(device, monkeypatch):
    x, inner, tail = operands(CASES["stride_2"], torch.float32, device, integers=False)
    narrow = inverted_residual(x, *inner, *tail, stride=2)
    monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(inverted_residual(x, *inner, *tail, stride=2), narrow)


def test_empty_batch_and_no_tail(device):
    x, inner, _ = operands(CASES["stride_2"], torch.float16, device, integers=True)
    assert inverted_residual(x[:0], *inner, stride=2).shape == (0, 24, 4, 4)
    assert torch.equal(inverted_residual(x, *inner, stride=2), layers(x, inner, 2, "relu6").to(x.dtype))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w1", (32, 5, 1, 1), r"w1 has shape \[32, 5, 1, 1\], expected \[32, 8, 1, 1\]"),
        ("b2", (31,), r"b2 has shape \[31\], expected \[32\]"),
        ("w2", (32, 1, 5, 5), "kernel 5, stride 1: expected at most 64 channels, a 3x3 kernel"),
        ("w3", (72, 32, 1, 1), "8 -> 72 channels"),
    ],
)
def test_bad_input_is_named(name, shape, message, device):
    shapes = {
        "x": (1, 8, 4, 4),
        "w1": (32, 8, 1, 1),
        "b1": (32,),
        "w2": (32, 1, 3, 3),
        "b2": (32,),
        "w3": (8, 32, 1, 1),
    }
    arguments = {k: torch.zeros(v, device=device) for k, v in (shapes | {name: shape}).items()}
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=message):
        inverted_residual(**arguments)
