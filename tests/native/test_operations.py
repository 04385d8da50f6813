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


@pytest.mark.parametrize("op", [native.ADD, native.MULTIPLY])
@pytest.mark.parametrize(
    "other",
    [(2, 21, 5, 4), (2, 21, 1, 1), (1, 21, 1, 1), (2, 1, 5, 4), (1, 21, 5, 1), (2, 1, 1, 4), (1, 1, 1, 1)],
)
def test_the_second_operand_is_broadcast(op, other):
    a, b = image(2, 21, 5, 4, integers=True), image(*other, integers=True)
    builder = Builder()
    x, x2 = padded_input(builder, a, 1), padded_input(builder, b, 1)
    y = builder.tensor(builder.shape(x), native.OUTPUT)
    builder.nodes.append(Node(op, x, y, x2=x2))
    assert torch.equal(run(builder, [a, b], y), nhwc(a + b if op == native.ADD else a * b))


# Errors of 2^x and of the division, a few units in the last place each, of values up to 1 (tanh: doubled).
ACTIVATION = {
    "none": (lambda x: x, 0.0, 0.0),
    "relu": (F.relu, 0.0, 0.0),
    "relu6": (F.relu6, 0.0, 0.0),
    "silu": (F.silu, 8 * 2**-24, 1e-30),
    "gelu": (F.gelu, 8 * 2**-24, 8 * 2**-24),
    "hardswish": (F.hardswish, 4 * 2**-24, 4 * 2**-24),
    "sigmoid": (torch.sigmoid, 8 * 2**-24, 1e-30),
    "hardsigmoid": (F.hardsigmoid, 2 * 2**-24, 2 * 2**-24),
    "tanh": (torch.tanh, 0.0, 8 * 2**-24),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.125), 0.0, 0.0),
}


@pytest.mark.parametrize("act", ACTIVATION)
@pytest.mark.parametrize("channels", [1, 16, 75])
def test_map(act, channels):
    x = 3 * image(2, channels, 5, 4)
    x[0, 0, 0, :4] = torch.tensor([float("nan"), -90.0, 90.0, 0.0])
    weight, bias = torch.randn(channels), torch.randn(channels)
    function, relative, absolute = ACTIVATION[act]
    given = single(native.MAP, x, nhwc(x).shape, border=1, act=act, f=0.125)
    torch.testing.assert_close(
        given.double(), nhwc(function(x.double())), rtol=relative, atol=absolute, equal_nan=True
    )
    given = single(native.MAP, x, nhwc(x).shape, border=1, act=act, f=0.125, weight=weight, bias=bias)
    alone = single(
        native.MAP,
        torch.addcmul(bias.view(-1, 1, 1), x, weight.view(-1, 1, 1)),
        nhwc(x).shape,
        act=act,
        f=0.125,
    )
    torch.testing.assert_close(given, alone, rtol=2e-6, atol=2e-6, equal_nan=True)  # rounded once or twice


@pytest.mark.parametrize(
    "kernel, stride, padding", [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 1), (1, 1)), ((5, 3), (3, 2), (2, 0))]
)
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("channels", [1, 16, 21])
def test_average_pool(kernel, stride, padding, ceil, padded, channels):
    x = image(2, channels, 9, 8)
    wanted = nhwc(F.avg_pool2d(x.double(), kernel, stride, padding, ceil, padded))
    numbers = (*kernel, *stride, *padding, 1, 1, int(padded), int(ceil))
    given = single(native.AVERAGE_POOL, x, wanted.shape, border=2, numbers=numbers)
    magnitude = nhwc(F.avg_pool2d(x.double().abs(), kernel, stride, padding, ceil, padded))
    assert ((given - wanted).abs() <= (kernel[0] * kernel[1] + 1) * 2**-24 * magnitude).all()


@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (3, 2, 1), (3, 2, 0), (5, 4, 2)])
@pytest.mark.parametrize("size", [(9, 8), (7, 10)])
def test_max_pool_that_rounds_up(kernel, stride, padding, size):
    x = image(2, 5, *size) - 100
    wanted = nhwc(F.max_pool2d(x, kernel, stride, padding, ceil_mode=True))
    numbers = (kernel, kernel, stride, stride, padding, padding, 1, 1, 0, 1)
    assert torch.equal(single(native.MAX_POOL, x, wanted.shape, border=1, numbers=numbers), wanted)


@pytest.mark.parametrize("groups", [1, 3, 21])
@pytest.mark.parametrize("affine", [False, True])
def test_group_norm(groups, affine):
    x = image(2, 42, 9, 7) + 100
    weight, bias = (torch.randn(42), torch.randn(42)) if affine else (None, None)
    given = single(
        native.GROUP_NORM, x, (2, 9, 7, 42), 1, numbers=(groups,), f=1e-3, weight=weight, bias=bias
    )
    wanted = F.group_norm(
        x.double(),
        groups,
        None if weight is None else weight.double(),
        None if bias is None else bias.double(),
        1e-3,
    )
    # The mean errs by (w + h + some of a vector) units in the last place of its 100; the rest is small beside it.
    bound = 40 * 2**-24 * 100 * (weight.abs().max() if affine else 1)
    assert (given - nhwc(wanted)).abs().max() < bound


@pytest.mark.parametrize("size", [(18, 14), (27, 7), (4, 5), (9, 7), (1, 1), (13, 30)])
@pytest.mark.parametrize("mode", [native.NEAREST, native.BILINEAR, native.BILINEAR_CORNERS])
def test_resize(size, mode):
    x = image(2, 21, 9, 7)
    options = {} if mode == native.NEAREST else {"align_corners": mode == native.BILINEAR_CORNERS}
    wanted = F.interpolate(x, size, mode="bilinear" if options else "nearest", **options)
    given = single(native.RESIZE, x, (2, *size, 21), 1, numbers=(mode,))
    # Positions err by units in the last place of up to 9, times a difference of up to 2 * max |x|.
    torch.testing.assert_close(
        given, nhwc(wanted), rtol=0, atol=0 if not options else 9 * 4 * 2**-23 * float(x.abs().max())
    )


@pytest.mark.parametrize(
    "padding", [(0, 1, 0, 1), (2, 0, 1, 3), (-1, 2, -2, -1), (-3, 0, 0, 0), (0, 0, 40, 0)]
)
@pytest.mark.parametrize("value", [0.0, -2.5])
@pytest.mark.parametrize("steps", [(1, 1), (2, 2), (1, 3), (7, 50)])
def test_pad(padding, value, steps):
    x = image(2, 5, 9, 8)
    wanted = nhwc(F.pad(x, padding, value=value)[:, :, :: steps[0], :: steps[1]])
    given = single(native.PAD, x, wanted.shape, border=1, numbers=(padding[2], padding[0], *steps), f=value)
    assert torch.equal(given, wanted)


@pytest.mark.parametrize("steps", [(0, 1), (1, 0), (-1, 1), (1, 2**31 - 1)])
def test_steps_that_lead_nowhere_are_refused(steps):
    with pytest.raises(ValueError, match="steps"):
        single(native.PAD, image(2, 5, 9, 8), (2, 9, 8, 5), numbers=(0, 0, *steps))


@pytest.mark.parametrize("threads", [1, 2])
def test_channels_are_cut_out_and_joined(threads):
    a, b = image(3, 40, 30, 17), image(3, 5, 30, 17)
    builder = Builder()
    x, x2 = padded_input(builder, a, 1), padded_input(builder, b, 0)
    y = builder.tensor((3, 30, 17, 5 + 21), native.OUTPUT)
    builder.copy(x2, y)
    builder.copy(x, y, y_channel=5, x_channel=9, channels=21)
    assert torch.equal(run(builder, [a, b], y, threads), nhwc(torch.cat([b, a[:, 9:30]], 1)))


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


def test_tokens_are_joined_selected_and_added_to_constants():
    x, first, places = torch.randn(3, 4, 2, 5), torch.randn(1, 1, 4), torch.randn(1, 11, 4)
    builder = Builder()
    pixels = padded_input(builder, x, 1)  # a border lies between its rows
    token, table = builder.tensor((3, 1, 1, 4)), builder.tensor((3, 1, 11, 4))
    joined, placed = builder.tensor((3, 1, 11, 4)), builder.tensor((3, 1, 11, 4))
    last = builder.tensor((3, 1, 1, 4), native.OUTPUT)
    builder.nodes.append(Node(native.CONSTANT, -1, token, weight=first))
    builder.copy(token, joined)
    builder.copy(pixels, joined, y_pixel=1)
    builder.nodes.append(Node(native.CONSTANT, -1, table, weight=places))
    builder.nodes.append(Node(native.ADD, joined, placed, x2=table))
    builder.copy(placed, last, x_pixel=10, pixels=1)
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
