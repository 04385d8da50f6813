"""Products of bfloat16, for any shape, window, tail and value: as exact as float32, or of rounded factors.

The former need AMX's tiles; the latter AVX-512's products of bfloat16 compute, too.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from native.test_convolution import ACTS, CASES, operands
from native_ops import convolve, needs_engine, padded_input, run

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.native import plan as native
from depthfuse.native.library import isa, why_missing
from depthfuse.native.plan import Builder, Node
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, assert_within

HERE = native.BY_TILES.get(isa(), ()) if why_missing() is None else ()
pytestmark = [
    needs_engine,
    pytest.mark.skipif(not HERE, reason="this processor has no products of bfloat16"),
]
needs_tiles = pytest.mark.skipif(native.TILES not in HERE, reason="this processor has no tiles")
both = pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(native.TILES, id="whole", marks=needs_tiles),
        pytest.param(native.TILES_BF16, id="rounded"),
    ],
)

POINT = Window((1, 1), (0, 0), (1, 1))
# As in test_convolution; these fill more than a band of memory, a panel, or a tile.
LARGE = {
    "1x1_bands": (1, 96, (45, 41), 70, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1_deep": (1, 1000, (5, 5), 33, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1_tokens": (3, 64, (1, 197), 96, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "3x3_bands": (2, 64, (40, 37), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3_s2_wide": (1, 48, (35, 67), 40, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "5x5_dilated": (1, 32, (20, 21), 32, (5, 5), (1, 1), (4, 4), (2, 2), 1),
    "stride_3": (2, 40, (20, 22), 32, (2, 3), (3, 3), (1, 1), (1, 1), 1),
    "7_pixels": (1, 32, (1, 7), 32, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}  # fmt: skip
DENSE = {name: case for name, case in (CASES | LARGE).items() if case[8] == 1}


@both
def test_products_are_taken_by_tiles(algorithm):
    """Else all that follows would be of the direct way. Their sums are in another order, or of rounded factors."""
    x, weight = torch.randn(1, 256, 8, 8), torch.randn(64, 256, 1, 1)
    ways = [convolve(x, weight, POINT, Tail(), way) for way in (algorithm, native.DIRECT)]
    assert not torch.equal(*ways)


@both
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_exact_on_integers(case, threads, algorithm):
    x, weight, tail, window = operands(case, integers=True)
    y = convolve(x, weight, window, tail, algorithm, threads=threads)
    assert torch.equal(y.double(), oracle.conv2d(x, weight, tail, window).value)


@needs_tiles
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_exact_on_integers_of_24_bits(case):
    """Every bit of a float32 counts: a sum of one product of 23 bits by a power of two, in each channel's place."""
    n, c, image, k, kernel, stride, padding, dilation, _ = case
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-(2**23), 2**23, (n, c, *image), generator=generator).float()
    weight = torch.zeros(k, c, *kernel)
    for out in range(k):
        weight[out, out * 7 % c, out % kernel[0], out % kernel[1]] = 2.0 ** (out % 5 - 2)
    window = Window(stride, padding, dilation)
    wanted = F.conv2d(x.double(), weight.double(), None, *window[:3])
    assert torch.equal(convolve(x, weight, window, Tail(), native.TILES).double(), wanted)
    # and the other way round: weights of 24 bits
    x, weight = (
        torch.zeros(n, c, *image),
        torch.randint(-(2**23), 2**23, weight.shape, generator=generator).float(),
    )
    x[:, c // 2, image[0] // 2, image[1] // 2] = 0.5
    wanted = F.conv2d(x.double(), weight.double(), None, *window[:3])
    assert torch.equal(convolve(x, weight, window, Tail(), native.TILES).double(), wanted)


@needs_tiles
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", ["3x3", "3x3_s2", "1x1", "1x1_tokens", "one_of_all"])
def test_error_bound_with_each_activation(case, act):
    x, weight, tail, window = operands(DENSE[case], integers=False)
    tail = tail._replace(act=act)
    y = convolve(x, weight, window, tail, native.TILES)
    assert_within(y, *oracle.conv2d(x, weight, tail, window, sums=torch.float32))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("case", ["3x3", "3x3_s2", "1x1", "1x1_tokens", "1x1_deep"])
def test_rounded_factors_and_nothing_else(case, act):
    """Sums, bias, residual and activation are of float32: the bound is that of factors that were rounded before."""
    x, weight, tail, window = operands(DENSE[case], integers=False)
    tail = tail._replace(act=act)
    y = convolve(x, weight, window, tail, native.TILES_BF16)
    rounded = x.bfloat16().float(), weight.bfloat16().float()
    assert_within(y, *oracle.conv2d(*rounded, tail, window, sums=torch.float32))
    whole = oracle.conv2d(x, weight, tail, window).value
    assert (y - whole).abs().max() > 1e-4 * whole.abs().max()  # they were


@needs_tiles
def test_errs_no_more_than_float32():
    """Root mean square of the error, of many sums of 512 products with factors of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, 16, 16, generator=generator) * torch.logspace(-3, 3, 512)[:, None, None]
    weight = torch.randn(64, 512, 1, 1, generator=generator) * torch.logspace(3, -3, 512)[:, None, None]
    exact = F.conv2d(x.double(), weight.double())
    tiles, direct = (
        (convolve(x, weight, POINT, Tail(), algorithm).double() - exact).square().mean().sqrt()
        for algorithm in (native.TILES, native.DIRECT)
    )
    assert 0 < tiles < 1.2 * direct


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38, -3.3961e38])
def test_values_that_have_no_parts(value):
    """They and all other values of the image come out as by float32, and so does the band after theirs."""
    for name in ("3x3", "1x1", "1x1_bands", "3x3_s2"):
        x, weight, tail, window = operands(DENSE[name], integers=True)
        x[0, 3, 2, 2] = value
        weight *= 2.0**-4  # so that the largest values stay finite
        for act in ("none", "relu6", "gelu"):
            y, rounded, wanted = (
                convolve(x, weight, window, tail._replace(act=act), algorithm)
                for algorithm in (native.TILES, native.TILES_BF16, native.DIRECT)
            )
            assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(rounded.isnan(), wanted.isnan())
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(rounded, wanted, rtol=2**-8, atol=1e-5, equal_nan=True)


@both
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
def test_weights_that_have_no_parts_are_multiplied_as_float32(value, algorithm):
    x, weight, _, window = operands(DENSE["1x1"], integers=True)
    weight[3, 5] = value
    x[:, 5] *= 0.125
    got, wanted = (convolve(x, weight, window, Tail(), each) for each in (algorithm, native.DIRECT))
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert not (wanted.abs() < 1e30).all()  # the weight was seen


@needs_tiles
def test_small_values_lose_digits_below_1e33_only():
    x, weight = torch.rand(1, 64, 8, 8) + 0.5, torch.rand(32, 64, 1, 1) + 0.5
    for scale, error in ((1e-30, 1e-6), (1e-36, 2**-8)):  # below, the high parts alone
        y = convolve(x * scale, weight, POINT, Tail(), native.TILES)
        torch.testing.assert_close(y / scale, F.conv2d(x, weight), rtol=error, atol=0.0)


@both
def test_what_lies_outside_the_image_is_zero_even_where_memory_was_used_before(algorithm):
    x, weight, _, window = operands(DENSE["3x3"], integers=True)
    wanted = F.conv2d(x.double(), weight.double(), None, *window[:3])
    nan = torch.full_like(x, float("nan"))
    for _ in range(2):
        assert convolve(nan, weight, window, Tail(), algorithm).isnan().all()
        assert torch.equal(convolve(x, weight, window, Tail(), algorithm).double(), wanted)


@pytest.mark.parametrize("act", ["relu6", "silu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_inverted_residuals_in_strips(stride, act):
    """Wide enough to be computed in strips: the products in them use tiles as the others do."""
    n, c, wide, h, w = 1, 24, 144, 56, 55
    generator = torch.Generator().manual_seed(2)

    def sample(*shape):
        return torch.randint(-2, 3, shape, generator=generator).float()

    x, expand, filters, project = sample(n, c, h, w), sample(wide, c), sample(wide, 1, 3, 3), sample(c, wide)
    outputs = []
    for algorithm in (native.TILES, native.TILES_BF16, native.DIRECT):
        builder = Builder()
        source, middle = padded_input(builder, x, 0), builder.tensor((n, h, w, wide))
        builder.pad(middle, 1)
        size = ((h - 1) // stride + 1, (w - 1) // stride + 1)
        filtered, y = builder.tensor((n, *size, wide)), builder.tensor((n, *size, c))
        ones = (1, 1, 1, 1, 0, 0, 1, 1)
        common = {"algorithm": algorithm, "numbers": ones}
        builder.nodes.append(Node(native.CONV, source, middle, act=act, weight=expand, **common))
        numbers = (3, 3, stride, stride, 1, 1, 1, 1)
        taps = filters.permute(2, 3, 1, 0)
        builder.nodes.append(Node(native.DEPTHWISE, middle, filtered, act=act, numbers=numbers, weight=taps))
        residual = source if stride == 1 else -1
        builder.nodes.append(Node(native.CONV, filtered, y, x2=residual, weight=project, **common))
        out = builder.tensor((n, *size, c), native.OUTPUT)
        builder.copy(y, out)
        outputs.append(run(builder, [x], out, threads=2))
    y = ACT[act](F.conv2d(x.double(), expand[..., None, None].double()))
    y = ACT[act](F.conv2d(y, filters.double(), None, stride, 1, 1, wide))
    y = F.conv2d(y, project[..., None, None].double()) + (x if stride == 1 else 0.0)
    for i, output in enumerate(outputs):
        given = output.permute(0, 3, 1, 2).double()
        if act == "relu6":
            assert torch.equal(given, y)
        else:  # silu's values are no integers: what is rounded shows
            assert (given - y).abs().max() < (1e-5 if i != 1 else 2e-2) * y.abs().max()


@both
def test_many_threads_at_once_use_tiles_of_their_own(algorithm):
    from concurrent.futures import ThreadPoolExecutor

    x, weight, _, window = operands(LARGE["3x3_bands"], integers=True)
    wanted = F.conv2d(x.double(), weight.double(), None, *window[:3])
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: convolve(x, weight, window, Tail(), algorithm, threads=2), range(12)):
            assert torch.equal(y.double(), wanted)


@needs_tiles
def test_tiles_of_others_do_not_disturb():
    """oneDNN uses tiles in bfloat16, too, with another configuration."""
    x, weight, _, window = operands(DENSE["1x1"], integers=True)
    wanted = F.conv2d(x.double(), weight.double(), None, *window[:3])
    a = torch.randint(-4, 5, (128, 128)).bfloat16()
    product = (a.double() @ a.double()).bfloat16()
    for _ in range(3):
        assert torch.equal(convolve(x, weight, window, Tail(), native.TILES).double(), wanted)
        assert torch.equal(a @ a, product)


SCRIPT = """
import sys, torch
sys.path[:0] = {paths!r}
from native_ops import convolve
from depthfuse.kernels.arguments import Tail, Window
from depthfuse.native import plan as native
from depthfuse.native.library import isa
x, weight = torch.arange(2.0 * 64 * 81).view(2, 64, 9, 9) % 7, torch.arange(48.0 * 64).view(48, 64, 1, 1) % 5
y = convolve(x, weight, Window((1, 1), (0, 0), (1, 1)), Tail(), {algorithm})
print(isa(), torch.equal(y.double(), torch.nn.functional.conv2d(x.double(), weight.double())))
"""


@both
@pytest.mark.parametrize("asked", ["avx512_bf16", "avx512", "avx2"])
def test_a_plan_with_tiles_runs_where_there_are_none(asked, algorithm):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(paths=sys.path, algorithm=algorithm)],
        env=os.environ | {"DEPTHFUSE_ISA": asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [asked, "True"]


@needs_tiles
def test_the_candidate_is_measured_and_kept(monkeypatch, tmp_path):
    from depthfuse.acceleration.running import native_engine

    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path))
    seen = []

    def least_ms(runs):
        for call in runs.values():
            call()
        seen.append(list(runs))
        return {name: float(name != native.TILES) for name in runs}

    monkeypatch.setattr(native_engine, "least_ms", least_ms)
    ones, square = (1, 1, 1, 1, 0, 0, 1, 1), (3, 3, 1, 1, 1, 1, 1, 1)
    fastest, exact = native_engine.fastest_algorithm, native_engine.exact_algorithm
    for _ in range(2):  # the second time from the cache
        assert fastest((1, 14, 14, 128), 256, ones) == native.TILES
        assert fastest((1, 14, 14, 64), 64, square) == native.TILES
        assert exact((1, 14, 14, 64), 64, square) == native.TILES
    assert seen == [
        [native.DIRECT, native.TILES],
        [native.DIRECT, native.WINOGRAD_2, native.WINOGRAD_4, native.TILES],
        [native.DIRECT, native.TILES],
    ]
    assert fastest((1, 7, 7, 512), 512, ones) == native.DIRECT  # few pixels
    assert fastest((1, 14, 14, 16), 16, ones) == native.DIRECT and len(seen) == 3  # little to do
