"""Every kernel at shapes that nobody thought of: integers, so that the result is exact and any slip is a mismatch.

A few dozen shapes a kernel in every run, 600 with DEPTHFUSE_LONG=1.
"""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_request import LONG

from depthfuse.kernels import winograd
from depthfuse.kernels.arguments import Tail, ThreeLayers, TwoLayers, Window
from depthfuse.kernels.attention import attention
from depthfuse.kernels.conv2d import conv2d
from depthfuse.kernels.depthwise import depthwise_conv2d, pack_weight
from depthfuse.kernels.depthwise_pointwise import depthwise_pointwise
from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.inverted_residual import inverted_residual
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.kernels.linear import linear
from depthfuse.kernels.mlp import mlp
from depthfuse.kernels.pool_linear import PoolLinearConfig, pool_linear
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import EXACT_ACTS, assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])
SIZES = [1, 2, 3, 7, 13, 14, 15, 56]
CHANNELS = [1, 3, 7, 8, 16, 24, 32, 33, 48, 96, 144, 160, 192, 320]
BATCHES = [1, 2, 3, 128]
MOST_WORK = 2_000_000 if INTERPRETED else 4_000_000_000  # multiply-adds a case

fuzz = settings(
    max_examples=600 if LONG else 25,
    deadline=None,
    # the fixtures (the device, NaN in torch.empty) are the same for every example
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Draw:
    """One example: sizes that stay within MOST_WORK, and small integer tensors between bands of NaN."""

    def __init__(self, data, device):
        self.data, self.device = data, device
        self.dtype = self.pick("dtype", DTYPES)
        self.work = 1
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))

    def pick(self, name, values):
        return self.data.draw(st.sampled_from(list(values)), name)

    def size(self, name, values, cost=1):
        """One of `values` that keeps the work within its limit; the smallest where none does."""
        fitting = [v for v in values if self.work * v**cost <= MOST_WORK] or [min(values)]
        value = self.pick(name, fitting)
        self.work *= value**cost
        return value

    def tensor(self, *shape, most=2, density=1.0):
        values = torch.randint(-most, most + 1, shape, generator=self.generator).double()
        values *= torch.rand(shape, generator=self.generator) < density
        values = values.to(self.device, self.dtype)
        if values.dim() == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        return guarded(values, offset=self.pick("offset", [64, 64, 1, 8]))

    def tail(self, channels, shape):
        """A tail of which each tensor is there or not."""
        shapes = ((channels,), shape, (channels,), (channels,))
        tensors = [self.tensor(*s) if self.pick("present", [True, False]) else None for s in shapes]
        return Tail(*tensors, self.pick("act", EXACT_ACTS))

    def pair(self, name, values):
        return (self.pick(name, values), self.pick(name, values))

    def image(self, least=(1, 1)):
        """Height and width, no smaller than `least`."""
        return [self.size("side", [s for s in SIZES if s >= n] or [n]) for n in least]


def draw_window(draw, kernels, groups=1):
    """A kernel, its window, and the least image that they fit."""
    kernel = draw.pair("kernel", kernels)
    stride, dilation = draw.pair("stride", [1, 1, 2, 3]), draw.pair("dilation", [1, 1, 2])
    padding = tuple(draw.pick("padding", range(0, k + 1)) for k in kernel)
    reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    draw.work *= kernel[0] * kernel[1]
    return kernel, Window(stride, padding, dilation, groups), [max(1, r) for r in reach]


def expect_equal(y, exact):
    """The exact result is an integer; where it is beyond float16's integers, both are rounded, once."""
    assert torch.equal(y, exact.value.to(y.dtype))


@fuzz
@given(st.data())
def test_conv2d(device, data):
    draw = Draw(data, device)
    groups = draw.pick("groups", [1, 1, 1, 2, 3])
    kernel, window, least = draw_window(draw, [1, 2, 3, 5, 7], groups)
    c, k = draw.size("C", CHANNELS), draw.size("K", CHANNELS)
    image, n = draw.image(least), draw.size("N", BATCHES)
    x = draw.tensor(n, c * groups, *image)
    weight = draw.tensor(k * groups, c, *kernel, most=1)
    tail = draw.tail(k * groups, (n, k * groups, *window.output_size(image, kernel)))
    config = draw.pick("config", [None, None, GemmConfig(32, 32, 32, splits=3)])
    y = conv2d(x, weight, tail, window, config=config)
    expect_equal(y, oracle.conv2d(x, weight, tail, window))


@fuzz
@given(st.data())
def test_linear(device, data):
    draw = Draw(data, device)
    c, k = draw.size("C", CHANNELS), draw.size("K", CHANNELS)
    leading = [draw.size("rows", [0, 1, 2, 17, 197])] + ([draw.size("rows", [1, 3])] if c % 2 else [])
    x, weight = draw.tensor(*leading, c), draw.tensor(k, c)
    tail = draw.tail(k, (*leading, k))
    config = draw.pick("config", [None, None, GemmConfig(32, 32, 32, splits=4)])
    expect_equal(linear(x, weight, tail, config=config), oracle.linear(x, weight, tail))


@fuzz
@given(st.data())
def test_depthwise(device, data):
    draw = Draw(data, device)
    kernel, window, least = draw_window(draw, [1, 2, 3, 5, 7])
    c, image, n = draw.size("C", CHANNELS), draw.image(least), draw.size("N", BATCHES)
    x, weight = draw.tensor(n, c, *image), draw.tensor(c, 1, *kernel)
    tail, window = draw.tail(c, (n, c, *window.output_size(image, kernel))), window._replace(groups=c)
    weight = pack_weight(weight) if draw.pick("packed", [True, False]) else weight
    expect_equal(depthwise_conv2d(x, weight, tail, window), oracle.conv2d(x, weight, tail, window))


@fuzz
@given(st.data())
def test_depthwise_pointwise(device, data):
    draw = Draw(data, device)
    kernel, window, least = draw_window(draw, [1, 3, 5, 7])
    c, k = draw.size("C", CHANNELS), draw.size("K", [v for v in CHANNELS if v <= 256])
    image, n = draw.image(least), draw.size("N", BATCHES)
    x, w1, b1 = draw.tensor(n, c, *image), draw.tensor(c, 1, *kernel, most=1, density=0.5), draw.tensor(c)
    # The sums of at most 49 taps stay below 2048, float16's last exact integer.
    weights, inner = TwoLayers(w1, b1, draw.tensor(k, c, 1, 1, most=1)), draw.pick("inner", EXACT_ACTS)
    tail = draw.tail(k, (n, k, *window.output_size(image, kernel)))
    y = depthwise_pointwise(x, weights, tail, window, act_inner=inner)
    expect_equal(y, oracle.depthwise_pointwise(x, weights, tail, window, inner))


@fuzz
@given(st.data())
def test_inverted_residual(device, data):
    draw = Draw(data, device)
    narrow = [v for v in CHANNELS if v <= 64]
    c, k, hidden = draw.size("C", narrow), draw.size("K", narrow), draw.size("hidden", [1, 8, 33, 96, 144])
    stride, image, n = draw.pick("stride", [1, 2]), draw.image(), draw.size("N", BATCHES)
    x, w1, b1 = draw.tensor(n, c, *image, most=1), draw.tensor(hidden, c, 1, 1, most=1), draw.tensor(hidden)
    w2, b2 = draw.tensor(hidden, 1, 3, 3, most=1), draw.tensor(hidden)
    w3 = draw.tensor(k, hidden, 1, 1, most=1, density=0.5)
    weights, inner = ThreeLayers(w1, b1, w2, b2, w3), draw.pick("inner", EXACT_ACTS)
    tail = draw.tail(k, (n, k, *((size - 1) // stride + 1 for size in image)))
    y = inverted_residual(x, weights, tail, stride=stride, act_inner=inner)
    expect_equal(y, oracle.inverted_residual(x, weights, tail, stride, inner))


@fuzz
@given(st.data())
def test_mlp(device, data):
    draw = Draw(data, device)
    narrow = [v for v in CHANNELS if v <= (256 if draw.dtype.itemsize == 2 else 128)]
    c, k, hidden = draw.size("C", narrow), draw.size("K", narrow), draw.size("hidden", [1, 8, 33, 96, 768])
    rows = draw.size("rows", [0, 1, 2, 17, 197])
    x, w1 = draw.tensor(rows, c, most=1), draw.tensor(hidden, c, most=1)
    weights = TwoLayers(w1, draw.tensor(hidden), draw.tensor(k, hidden, most=1, density=0.2))
    inner, tail = draw.pick("inner", EXACT_ACTS), draw.tail(k, (rows, k))
    expect_equal(mlp(x, weights, tail, act_inner=inner), oracle.mlp(x, weights, tail, inner))


@fuzz
@given(st.data())
def test_winograd(device, data):
    draw = Draw(data, device)
    window = Window(padding=draw.pair("padding", [0, 1, 2]))
    draw.work *= 9
    c, k = draw.size("C", CHANNELS), draw.size("K", CHANNELS)
    image, n = draw.image([max(1, 3 - 2 * p) for p in window.padding]), draw.size("N", BATCHES)
    x = draw.tensor(n, c, *image)
    weight = 4 * draw.tensor(k, c, 3, 3, most=1)  # so that the transformed weights are integers
    tail = draw.tail(k, (n, k, *window.output_size(image, (3, 3))))
    y = winograd.winograd_conv2d(x, winograd.pack_weight(weight), tail, window)
    expect_equal(y, oracle.conv2d(x, weight, tail, window))


@fuzz
@given(st.data())
def test_pool_linear(device, data):
    draw = Draw(data, device)
    side = draw.pair("side", [1, 2, 4, 8])  # a power of two of pixels: their mean is exact
    c, k, n = draw.size("C", CHANNELS), draw.size("K", [1, 7, 100]), draw.size("N", [0, 1, 2, 3, 20])
    x, weight, bias = draw.tensor(n, c, *side), draw.tensor(k, c), draw.tensor(k)
    config = draw.pick("config", [PoolLinearConfig(True), PoolLinearConfig(False)])
    expect_equal(pool_linear(x, weight, bias, config=config), oracle.pool_linear(x, weight, bias))


@fuzz
@given(st.data())
def test_attention(device, data):
    """Zero queries and keys: the mean of the values, within the rounding of its sum."""
    draw = Draw(data, device)
    heads, d = draw.pick("heads", [1, 2, 3]), draw.size("D", [32, 40, 64, 96, 128])
    tokens, n = draw.size("tokens", [1, 2, 17, 50, 197, 257], cost=2), draw.size("N", [0, 1, 3])
    v = draw.tensor(n, tokens, heads * d, most=3)
    zeros = torch.zeros(n, tokens, 2 * heads * d, dtype=v.dtype, device=v.device)
    qkv = guarded(torch.cat((zeros, v), -1))
    assert_within(attention(qkv, heads=heads), *oracle.attention(qkv, heads, sums=torch.float32))
