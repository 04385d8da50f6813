"""Convolutions of the engine: exact on integers, within a derived bound on reals, at any shape, window and tail."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from native_ops import convolve, needs_engine, padded_input, run
from on_request import LONG

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.native import plan as native
from depthfuse.native.plan import Builder, Node
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, assert_within

pytestmark = needs_engine

ACTS = list(ACT)
# batch, channels, (height, width), filters, kernel, stride, padding, dilation, groups
CASES = {
    "stem_7x7_s2": (2, 3, (15, 14), 40, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "patch_4x4_s4": (1, 3, (16, 16), 48, (4, 4), (4, 4), (0, 0), (1, 1), 1),
    "3x3": (2, 48, (7, 7), 33, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3_s2": (3, 32, (7, 5), 24, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "one_of_all": (1, 1, (1, 1), 1, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": (2, 24, (8, 8), 70, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1_s2": (2, 96, (7, 7), 24, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "dilated": (1, 32, (9, 9), 16, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "asymmetric": (1, 32, (9, 6), 17, (3, 1), (2, 1), (1, 0), (1, 1), 1),
    "more_padding_than_needed": (1, 8, (4, 5), 16, (3, 3), (1, 1), (2, 2), (1, 1), 1),
    "wide": (1, 130, (14, 14), 200, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "groups_of_4": (2, 12, (9, 8), 12, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "groups_of_8": (1, 56, (9, 8), 56, (3, 3), (2, 2), (1, 1), (1, 1), 7),
    "groups_of_5_and_more_out": (2, 15, (6, 5), 21, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "groups_of_2": (1, 38, (7, 7), 38, (1, 1), (1, 1), (0, 0), (1, 1), 19),
    "groups_of_20_s2": (1, 40, (9, 8), 80, (3, 3), (2, 2), (1, 1), (1, 1), 2),
    "groups_of_70_1x1": (2, 16, (7, 5), 140, (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "groups_of_33_dilated": (1, 99, (9, 8), 99, (3, 2), (1, 1), (2, 1), (2, 1), 3),
    "filters_of_one_channel": (1, 6, (8, 8), 18, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    "depthwise_3x3": (2, 32, (9, 11), 32, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    "depthwise_5x5_s2": (1, 20, (9, 8), 20, (5, 5), (2, 2), (2, 2), (1, 1), 20),
    "depthwise_7x7": (1, 3, (7, 7), 3, (7, 7), (1, 1), (3, 3), (1, 1), 3),
    "depthwise_3x3_wide": (2, 53, (7, 24), 53, (3, 3), (1, 1), (1, 1), (1, 1), 53),
    "depthwise_5x5": (2, 36, (10, 17), 36, (5, 5), (1, 1), (2, 2), (1, 1), 36),
    "depthwise_7x7_wide": (2, 33, (9, 15), 33, (7, 7), (1, 1), (3, 3), (1, 1), 33),
    "depthwise_one_row": (2, 32, (1, 9), 32, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    "depthwise_oblong": (1, 32, (9, 8), 32, (5, 3), (1, 1), (2, 1), (1, 1), 32),
    "depthwise_s2_down": (1, 32, (9, 8), 32, (3, 3), (2, 1), (1, 1), (1, 1), 32),
    "depthwise_dilated_down": (1, 32, (9, 8), 32, (3, 3), (1, 1), (2, 1), (2, 1), 32),
    "depthwise_dilated": (1, 40, (8, 9), 40, (3, 3), (1, 1), (2, 2), (2, 2), 40),
}  # fmt: skip
# Winograd: batch, channels, (height, width), filters, padding
SQUARE = {
    "14x14": (1, 32, (14, 14), 32, 1),
    "7x7": (2, 40, (7, 7), 24, 1),
    "1x1": (1, 8, (1, 1), 8, 1),
    "odd": (3, 5, (9, 13), 19, 1),
    "no_padding": (1, 16, (6, 5), 16, 0),
    "wide_padding": (1, 16, (5, 6), 16, 2),
    "many_tiles": (2, 16, (33, 29), 16, 1),
}


def operands(case, integers, seed=0):
    n, c, image, k, kernel, stride, padding, dilation, groups = case
    generator = torch.Generator().manual_seed(seed)

    def sample(*shape):
        if integers:
            return torch.randint(-3, 4, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    window = Window(stride, padding, dilation, groups)
    x, weight = sample(n, c, *image), sample(k, c // groups, *kernel)
    size = window.output_size(image, kernel)
    return x, weight, Tail(sample(k), sample(n, k, *size), sample(k), sample(k), "relu"), window


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exact_on_integers(case, threads):
    x, weight, tail, window = operands(case, integers=True)
    y = convolve(x, weight, window, tail, threads=threads)
    assert torch.equal(y.double(), oracle.conv2d(x, weight, tail, window).value)


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exact_without_an_affine(case, act):
    """These tails are added to the sums while they are in registers."""
    x, weight, tail, window = operands(case, integers=True)
    for residual in (None, tail.residual):
        plain = Tail(tail.bias, residual, None, None, act)
        y = convolve(x, weight, window, plain, threads=3)
        assert torch.equal(y.double(), oracle.conv2d(x, weight, plain, window).value)


@pytest.mark.parametrize("act", ["none", "relu6", "gelu"])
@pytest.mark.parametrize("filters", [16, 40])
def test_a_large_bias_is_rounded_once(filters, act):
    """Products added to it one by one would err some ten times as much."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 576, 7, 7, generator=generator)
    weight = torch.randn(filters, 576, 1, 1, generator=generator) / 24
    bias = torch.full((filters,), 4096.0)
    y = convolve(
        x,
        weight,
        Window((1, 1), (0, 0), (1, 1)),
        Tail(bias, -bias.expand(1, 7, 7, -1).permute(0, 3, 1, 2), None, None, act),
    )
    wanted = ACT[act](F.conv2d(x.double(), weight.double()))
    error = (y.double() - wanted).square().mean().sqrt()
    assert error < 2**-12  # half of the distance between numbers next to 4096


@pytest.mark.parametrize("filters", range(1, 67))
def test_writes_its_own_channels_only(filters):
    """A second convolution reads all of the first one's output, and the zeros around it."""
    generator = torch.Generator().manual_seed(filters)
    x, first = (
        torch.randint(-3, 4, shape, generator=generator).float() for shape in ((2, 9, 5, 6), (filters, 9))
    )
    second = torch.randint(-3, 4, (3, filters, 3, 3), generator=generator).float()
    builder = Builder()
    source = padded_input(builder, x, 0)
    middle, y = builder.tensor((2, 5, 6, filters)), builder.tensor((2, 5, 6, 3))
    builder.pad(middle, 1)
    builder.nodes.append(Node(native.CONV, source, middle, numbers=(1, 1, 1, 1, 0, 0, 1, 1), weight=first))
    taps = second.permute(0, 2, 3, 1)
    builder.nodes.append(Node(native.CONV, middle, y, numbers=(3, 3, 1, 1, 1, 1, 1, 1), weight=taps))
    out = builder.tensor((2, 5, 6, 3), native.OUTPUT)
    builder.copy(y, out)
    wanted = F.conv2d(F.conv2d(x.double(), first[..., None, None].double()), second.double(), padding=1)
    for threads in (1, 3):
        assert torch.equal(run(builder, [x], out, threads).double(), wanted.permute(0, 2, 3, 1))


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("filters", [5, 16, 24, 32])
def test_nan_and_infinity_come_through_a_clamp(filters, act):
    x = torch.ones(1, 4, 3, 3)
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[0, 2, 2, 2] = float("nan"), float("inf"), -float("inf")
    weight, window = torch.ones(filters, 4, 1, 1), Window((1, 1), (0, 0), (1, 1))
    y = convolve(x, weight, window, Tail(None, None, None, None, act))
    assert torch.equal(y.isnan(), ACT[act](F.conv2d(x, weight)).isnan())
    assert torch.equal(y.nan_to_num(7.0), ACT[act](F.conv2d(x, weight)).nan_to_num(7.0))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", ["3x3", "1x1", "groups_of_20_s2", "depthwise_3x3", "one_of_all"])
def test_error_bound_with_each_activation(case, act):
    x, weight, tail, window = operands(CASES[case], integers=False)
    tail = tail._replace(act=act)
    y = convolve(x, weight, window, tail)
    assert_within(y, *oracle.conv2d(x, weight, tail, window, sums=torch.float32))


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)))
def test_every_tail(given):
    for case in ("3x3", "groups_of_20_s2", "depthwise_3x3"):
        x, weight, tail, window = operands(CASES[case], integers=True)
        values = [t if there else None for t, there in zip(tail[:4], given, strict=True)]
        tail = Tail(*values, "relu6")
        y = convolve(x, weight, window, tail)
        assert torch.equal(y.double(), oracle.conv2d(x, weight, tail, window).value)


def square(case):
    n, c, image, k, padding = case
    return n, c, image, k, (3, 3), (1, 1), (padding, padding), (1, 1), 1


@pytest.mark.parametrize("case", SQUARE.values(), ids=SQUARE)
def test_small_winograd_is_exact_on_integers(case):
    """F(2, 3) multiplies by halves and quarters only."""
    x, weight, tail, window = operands(square(case), integers=True)
    y = convolve(x, weight, window, tail, native.WINOGRAD_2)
    assert torch.equal(y.double(), oracle.conv2d(x, weight, tail, window).value)


def winograd_matrices(tile):
    """A^T, G and B^T in float64, from the points."""
    a = math.sqrt(0.5)
    points = [0.0, 1.0, -1.0] if tile == 2 else [0.0, a, -a, 2 * a, -2 * a]
    size = tile + 2
    out = torch.zeros(tile, size, dtype=torch.float64)
    kernel, given = torch.zeros(size, 3, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)

    def polynomial(roots):
        coefficients = torch.ones(1, dtype=torch.float64)
        for root in roots:
            shifted = torch.cat([torch.zeros(1, dtype=torch.float64), coefficients])
            shifted[:-1] -= root * coefficients
            coefficients = shifted
        return coefficients

    for i, point in enumerate(points):
        others = [p for p in points if p != point]
        out[:, i] = torch.tensor([point**k for k in range(tile)], dtype=torch.float64)
        kernel[i] = torch.tensor([1.0, point, point**2], dtype=torch.float64) / math.prod(
            point - p for p in others
        )
        given[i, : size - 1] = polynomial(others)
    out[-1, -1], kernel[-1, -1], given[-1] = 1.0, 1.0, polynomial(points)
    return out, kernel, given


def winograd_bound(x, weight, tile, padding):
    """(value, error) of the convolution by F(tile, 3): each of its sums errs by its length times 2^-24 of the sum of
    magnitudes, and every magnitude is that of the transforms' absolute values."""
    out, kernel, given = winograd_matrices(tile)
    size, (_, c, h, w) = tile + 2, x.shape
    high, wide = h + 2 * padding - 2, w + 2 * padding - 2
    tiles_h, tiles_w = -(-high // tile), -(-wide // tile)
    padded = F.pad(
        x.double(), (padding, tiles_w * tile + 2 - w - padding, padding, tiles_h * tile + 2 - h - padding)
    )
    pieces = padded.unfold(2, size, tile).unfold(3, size, tile)

    def compute(pieces, weight, out, kernel, given):
        u = torch.einsum("ir,kcrs,js->kcij", kernel, weight, kernel)
        v = torch.einsum("ir,ncpqrs,js->ncpqij", given, pieces, given)
        m = torch.einsum("kcij,ncpqij->nkpqij", u, v)
        y = torch.einsum("ri,nkpqij,sj->nkprqs", out, m, out)
        return y.reshape(*y.shape[:2], tiles_h * tile, tiles_w * tile)[:, :, :high, :wide]

    value = compute(pieces, weight.double(), out, kernel, given)
    magnitude = compute(pieces.abs(), weight.double().abs(), out.abs(), kernel.abs(), given.abs())
    return value, (c + 4 * size + 8) * 2**-24 * magnitude


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("case", SQUARE.values(), ids=SQUARE)
def test_winograd_is_within_its_bound(case, tile):
    x, weight, _, window = operands(square(case), integers=False)
    y = convolve(x, weight, window, Tail(), {2: native.WINOGRAD_2, 4: native.WINOGRAD_4}[tile])
    value, error = winograd_bound(x, weight, tile, case[4])
    exact = F.conv2d(x.double(), weight.double(), None, *window)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)  # the matrices are right
    assert ((y.double() - exact).abs() <= error).all()


@pytest.mark.parametrize("tile", [native.WINOGRAD_2, native.WINOGRAD_4])
def test_winograd_errs_a_few_times_more_than_direct(tile):
    """What the points of F(4, 3) are chosen for: with the usual ones it would be 30 times."""
    x, weight, _, window = operands(square((1, 128, (14, 14), 128, 1)), integers=False)
    exact = F.conv2d(x.double(), weight.double(), None, *window)
    direct, fast = (
        (convolve(x, weight, window, Tail(), algorithm).double() - exact).square().mean().sqrt()
        for algorithm in (native.DIRECT, tile)
    )
    assert fast < 8 * direct


@pytest.mark.parametrize("algorithm", [native.DIRECT, native.WINOGRAD_2, native.WINOGRAD_4])
def test_what_lies_outside_the_image_is_zero_even_where_memory_was_used_before(algorithm):
    """Borders lie in memory that other tensors use; what is NaN there must not be read."""
    x, weight, _, window = operands(square((2, 16, (6, 7), 16, 1)), integers=True)
    wanted = F.conv2d(x.double(), weight.double(), None, *window)
    y = convolve(x, weight, window, Tail(), algorithm)
    assert_within(y, wanted, torch.full_like(wanted, 1e-3))
    nan = torch.full_like(x, float("nan"))
    assert convolve(nan, weight, window, Tail(), algorithm).isnan().all()


def test_nan_stays_where_it_is_seen():
    x, weight, tail, window = operands(CASES["3x3"], integers=False)
    x[0, 3, 2, 2] = float("nan")
    for act in ACTS:
        seen = convolve(x, weight, window, tail._replace(act=act)).isnan()
        wanted = F.conv2d(x, weight, None, *window).isnan()
        assert torch.equal(seen, wanted), act


def random_case(rng):
    kernel = (rng.choice([1, 1, 2, 3, 3, 5, 7]), rng.choice([1, 1, 2, 3, 3, 5, 7]))
    dilation = (rng.choice([1, 1, 2]), rng.choice([1, 1, 2]))
    padding = (rng.randint(0, 3), rng.randint(0, 3))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    image = tuple(n + rng.randint(0, 14) for n in least)
    channels = rng.choice([1, 3, 4, 8, 15, 16, 24, 33, 64])
    depthwise, filters, groups = rng.random() < 0.3, rng.choice([1, 5, 8, 16, 17, 40, 64]), 1
    if depthwise:
        filters, groups = channels, channels
    elif rng.random() < 0.3:
        groups = math.gcd(channels, filters)
    stride = (rng.randint(1, 3), rng.randint(1, 3))
    return (
        rng.randint(1, 3), channels, image, filters, kernel, stride, padding, dilation, groups,
    )  # fmt: skip


def test_random_windows():
    """5,000 with DEPTHFUSE_LONG=1."""
    rng = random.Random(0)
    for seed in range(5000 if LONG else 200):
        case = random_case(rng)
        x, weight, tail, window = operands(case, integers=True, seed=seed)
        values = [t if rng.random() < 0.5 else None for t in tail[:4]]
        tail = Tail(*values, rng.choice(["none", "relu", "relu6"]))
        square3 = (
            case[4] == (3, 3) and case[5] == case[7] == (1, 1) and case[6][0] == case[6][1] and case[8] == 1
        )
        algorithm = rng.choice(
            [native.DIRECT, native.TILES, native.TILES_BF16, *[native.WINOGRAD_2] * square3]
        )
        y = convolve(x, weight, window, tail, algorithm, threads=rng.randint(1, 4))
        assert torch.equal(y.double(), oracle.conv2d(x, weight, tail, window).value), (case, algorithm)
