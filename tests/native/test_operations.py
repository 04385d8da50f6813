"""Everything of the engine that is no convolution, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from native_ops import needs_engine, nhwc, padded_input, run

from depthfuse.native import plan as native
from depthfuse.native.plan import Builder, Node
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within

pytestmark = needs_engine


def image(*shape, integers=False):
    return torch.randint(-9, 10, shape).float() if integers else torch.randn(shape)


def single(op, x, shape, border=0, **options):
    """An operation on an image [N, C, H, W] that gives [n, h, w, c]."""
    builder = Builder()
    source = padded_input(builder, x, border)
    y = builder.tensor(shape, native.OUTPUT)
    builder.nodes.append(Node(op, source, y, **options))
    return run(builder, [x], y)


@pytest.mark.parametrize(
    "window", [(3, 3, 2, 2, 1, 1, 1, 1), (2, 3, 1, 2, 0, 1, 1, 1), (3, 2, 1, 1, 1, 0, 2, 1)]
)
@pytest.mark.parametrize("channels", [1, 8, 21])
def test_max_pool(window, channels):
    x = image(2, channels, 9, 8) - 100  # all negative: zeros of a border would win
    wanted = nhwc(F.max_pool2d(x, window[:2], window[2:4], window[4:6], window[6:]))
    given = single(native.MAX_POOL, x, wanted.shape, border=2, numbers=window)
    assert torch.equal(given, wanted)
    x[0, 0, 4, 4] = float("nan")
    wanted = nhwc(F.max_pool2d(x, window[:2], window[2:4], window[4:6], window[6:]))
    given = single(native.MAX_POOL, x, wanted.shape, border=2, numbers=window)
    assert torch.equal(given.isnan(), wanted.isnan())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 40, 7, 7), (2, 13, 3, 50)])
def test_mean(shape):
    x = image(*shape)
    given = single(native.MEAN, x, (shape[0], 1, 1, shape[1]))
    wanted = nhwc(x.double().mean((2, 3), keepdim=True))
    magnitude = nhwc(x.double().abs().mean((2, 3), keepdim=True))
    assert ((given - wanted).abs() <= (shape[2] + shape[3] + 2) * 2**-24 * magnitude).all()


@pytest.mark.parametrize("act", ["none", "relu", "hardswish"])
@pytest.mark.parametrize("channels", [1, 16, 21])
def test_add(act, channels):
    a, b = image(2, channels, 5, 4, integers=True), image(2, channels, 5, 4, integers=True)
    builder = Builder()
    x, x2 = padded_input(builder, a, 1), padded_input(builder, b, 0)
    y = builder.tensor(builder.shape(x), native.OUTPUT)
    builder.nodes.append(Node(native.ADD, x, y, x2=x2, act=act))
    wanted = nhwc(oracle.ACT[act]((a + b).double()))
    torch.testing.assert_close(run(builder, [a, b], y).double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("channels", [1, 5, 64, 100])
def test_layer_norm(channels, affine):
    x = image(2, channels, 3, 5) + 1000  # a common offset must not cancel the variance away
    weight, bias = (torch.randn(channels), torch.randn(channels)) if affine else (None, None)
    given = single(native.LAYER_NORM, x, (2, 3, 5, channels), f=1e-3, weight=weight, bias=bias)
    value = oracle.layer_norm(
        oracle.Value(nhwc(x.double()), torch.zeros(2, 3, 5, channels, dtype=torch.float64)), 1e-3, -1,
        oracle.Rounding.of(x, torch.float32),
    )  # fmt: skip
    if affine:
        error = (
            value.error * weight.double().abs() + 2**-23 * (value.value * weight).abs() + 2**-23 * bias.abs()
        )
        value = oracle.Value(value.value * weight.double() + bias.double(), error)
    assert_within(given, *value)


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 1), (7, 2, 16), (197, 3, 64), (50, 1, 33)])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention(tokens, heads, dim, threads):
    qkv = torch.randn(2, tokens, 3 * heads * dim)
    builder = Builder()
    x = builder.tensor((2, 1, tokens, 3 * heads * dim), native.INPUT)
    y = builder.tensor((2, 1, tokens, heads * dim), native.OUTPUT)
    builder.nodes.append(Node(native.ATTENTION, x, y, numbers=(heads,), f=dim**-0.5))
    given = run(builder, [qkv], y, threads).view(2, tokens, heads * dim)
    assert_within(given, *oracle.attention(qkv, heads, sums=torch.float32))


def test_attention_of_large_scores():
    qkv = 30 * torch.randn(1, 20, 3 * 32)
    builder = Builder()
    x, y = builder.tensor((1, 1, 20, 96), native.INPUT), builder.tensor((1, 1, 20, 32), native.OUTPUT)
    builder.nodes.append(Node(native.ATTENTION, x, y, numbers=(1,), f=32**-0.5))
    q, k, v = qkv.double().view(1, 20, 3, 1, 32).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 20, 32)
    torch.testing.assert_close(run(builder, [qkv], y).view(1, 20, 32).double(), wanted, rtol=0, atol=2e-3)


def test_tokens_are_joined_selected_and_added_to_constants():
    x, first, places = torch.randn(3, 4, 2, 5), torch.randn(1, 1, 4), torch.randn(1, 11, 4)
    builder = Builder()
    pixels = padded_input(builder, x, 1)  # a border lies between its rows
    token, table = builder.tensor((3, 1, 1, 4)), builder.tensor((3, 1, 11, 4))
    joined, placed = builder.tensor((3, 1, 11, 4)), builder.tensor((3, 1, 11, 4))
    last = builder.tensor((3, 1, 1, 4), native.OUTPUT)
    builder.nodes += [
        Node(native.CONSTANT, -1, token, weight=first),
        Node(native.COPY, token, joined, numbers=(0,)),
        Node(native.COPY, pixels, joined, numbers=(1,)),
        Node(native.CONSTANT, -1, table, weight=places),
        Node(native.ADD, joined, placed, x2=table),
        Node(native.SELECT, placed, last, numbers=(10,)),
    ]
    wanted = (torch.cat([first.expand(3, -1, -1), x.flatten(2).mT], 1) + places)[:, 10]
    assert torch.equal(run(builder, [x], last).view(3, 4), wanted)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 40, 16, 3)])
def test_layouts_come_back(shape):
    x = image(*shape)
    builder = Builder()
    source = padded_input(builder, x, 1)
    y = builder.tensor(builder.shape(source), native.OUTPUT)
    builder.nodes.append(Node(native.TO_PLANES, source, y))
    assert torch.equal(run(builder, [x], y).view(shape), x)
