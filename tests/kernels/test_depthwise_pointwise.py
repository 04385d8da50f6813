"""Depthwise then 1x1: exact on integers, within its error bound on reals, blind to what lies outside."""

import pytest
import torch
import torch.nn.functional as F

from depthfuse.kernels import depthwise_pointwise as module
from depthfuse.kernels.depthwise import pack_weight
from depthfuse.kernels.depthwise_pointwise import DepthwisePointwiseConfig, depthwise_pointwise
from depthfuse.kernels.launch import INTERPRETED
from tests.kernels.oracle import ACTIVATIONS, assert_within, finish, forward_error, guarded

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
    n, c, image, k, window, stride, padding, dilation = case

    def sample(*shape):
        if integers:  # sparse, so that sums stay exact in float16 between the layers
            return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.5)).to(device, dtype)
        return torch.randn(shape).to(device, dtype)

    x = sample(n, c, *image).contiguous(memory_format=torch.channels_last)
    inner = [sample(c, 1, *window), sample(c), sample(k, c, 1, 1)]
    arguments = {"stride": stride, "padding": padding, "dilation": dilation}
    shape = (n, k, *F.conv2d(x.double(), inner[0].double(), None, groups=c, **arguments).shape[2:])
    residual = sample(*shape).contiguous(memory_format=torch.channels_last)
    tail = [sample(k), residual, sample(k), sample(k)]
    return guarded(x), [guarded(t) for t in inner], [guarded(t) for t in tail], arguments


def layers(x, inner, arguments, act, absolute=False):
    """Both layers in float64 up to the tail; `absolute`: of magnitudes, for the error bound."""
    x, w1, b1, w2 = (t.double().abs() if absolute else t.double() for t in (x, *inner))
    filtered = F.conv2d(x, w1, b1, groups=x.shape[1], **arguments)
    return F.conv2d(filtered if absolute else ACTIVATIONS[act](filtered), w2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, inner, tail, arguments = operands(case, dtype, device, integers=True)
    y = depthwise_pointwise(x, *inner, *tail, **arguments, act_inner="relu6", act="relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, finish(layers(x, inner, arguments, "relu6"), *tail, "relu").to(dtype))


@pytest.mark.parametrize("act", ["none", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound(dtype, act, device):
    x, inner, tail, arguments = operands(CASES["7x7"], dtype, device, integers=False)
    exact = finish(layers(x, inner, arguments, act), *tail, "gelu")
    magnitude = layers(x, inner, arguments, act, absolute=True)
    channels = x.shape[1]
    bound = forward_error(channels + 49, 3 * magnitude, exact, *tail, dtype)
    # One more rounding: the filtered tensor is taken in the dtype of x by the product.
    bound = bound + 1.5 * torch.finfo(dtype).eps * magnitude * tail[2].double().abs().view(-1, 1, 1)
    y = depthwise_pointwise(x, *inner, *tail, **arguments, act_inner=act, act="gelu")
    assert_within(y, exact, bound)


@pytest.mark.parametrize("patch_w", [1, 2, 8])
def test_any_patch_and_a_packed_weight_are_exact(patch_w, device):
    x, inner, tail, arguments = operands(CASES["3x3_s2"], torch.float32, device, integers=True)
    inner[0] = pack_weight(inner[0])
    config = DepthwisePointwiseConfig(patch_w, 16, 32, 4)
    y = depthwise_pointwise(x, *inner, *tail, **arguments, config=config)
    assert torch.equal(y.double(), finish(layers(x, inner, arguments, "none"), *tail, "none"))


@pytest.mark.parametrize("present", [0, 1, 2, 4, 8])
def test_every_part_of_the_tail_is_optional(present, device):
    x, (w1, _, w2), tail, arguments = operands(CASES["3x3"], torch.float16, device, integers=True)
    tail = [t if present >> i & 1 else None for i, t in enumerate(tail)]
    y = depthwise_pointwise(x, w1, None, w2, *tail, **arguments)
    none = torch.zeros(len(w1), dtype=x.dtype, device=device)
    assert torch.equal(y, finish(layers(x, (w1, none, w2), arguments, "none"), *tail, "none").to(x.dtype))


def test_64_bit_offsets_and_repeated_runs_give_the_same_bits(device, monkeypatch):
    x, inner, tail, arguments = operands(CASES["7x7"], torch.float32, device, integers=False)
    first = depthwise_pointwise(x, *inner, *tail, **arguments)
    assert torch.equal(depthwise_pointwise(x, *inner, *tail, **arguments), first)
    monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(depthwise_pointwise(x, *inner, *tail, **arguments), first)


def test_empty_batch(device):
    x, inner, _, arguments = operands(CASES["3x3_s2"], torch.float16, device, integers=True)
    assert depthwise_pointwise(x[:0], *inner, **arguments).shape == (0, 24, 4, 4)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w1", (8, 2, 3, 3), "x has 8 channels and weight .* with groups=8 takes 16"),
        ("w1", (8, 1, 9, 9), r"kernel \[9, 9\] with dilation \[1, 1\] is larger than the image"),
        ("b1", (7,), r"b1 has shape \[7\], expected \[8\]"),
        ("w2", (16, 4, 1, 1), r"w2 has shape \[16, 4, 1, 1\], expected \[16, 8, 1, 1\]"),
        ("w2", (257, 8, 1, 1), "257 output channels: expected at most 256; use depthwise_conv2d and conv2d"),
    ],
)
def test_bad_input_is_named(name, shape, message, device):
    shapes = {"x": (1, 8, 4, 4), "w1": (8, 1, 3, 3), "b1": (8,), "w2": (16, 8, 1, 1)}
    arguments = {k: torch.zeros(v, device=device) for k, v in (shapes | {name: shape}).items()}
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=message):
        depthwise_pointwise(**arguments)
