"""The native inverted residual, on the CPU: the source that HIP and CUDA compile, its threads one after another."""

import shutil

import pytest
import torch

from benchmarks.kernels.native import shared_bytes
from depthfuse.kernels.arguments import NO_TAIL, Tail, ThreeLayers
from depthfuse.native.building import run_compiler
from depthfuse.native.gpu import SIZES, SOURCE, compiler_of, inverted_residual, pack
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, GUARD, assert_within, guarded

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to build it with")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]  # the last one without a GPU only

# batch, channels, (height, width), hidden, outputs, stride
CASES = {
    "skip": (2, 24, (9, 13), 144, 24, 1),
    "stride_2": (2, 16, (15, 8), 96, 24, 2),
    "stride_2_wide": (1, 64, (17, 18), 50, 64, 2),
    "odd_channels": (1, 7, (7, 7), 33, 9, 1),
    "odd_channels_stride_2": (2, 33, (9, 13), 70, 41, 2),
    "wide": (1, 64, (15, 8), 40, 64, 1),
    "1x1_image": (3, 3, (1, 1), 16, 8, 2),
    "one_of_all": (1, 1, (2, 1), 1, 1, 1),
    "many_blocks": (2, 20, (33, 25), 70, 40, 1),
}  # fmt: skip


def operands(case, dtype, integers):
    n, c, image, hidden, k, stride = case
    torch.manual_seed(0)

    def sample(*shape):
        if integers:  # sparse, so that sums stay exact in bfloat16 between the layers and after them
            return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.2)).to(dtype)
        return torch.randn(shape).to(dtype)

    def images(*shape):
        return guarded(sample(*shape).contiguous(memory_format=torch.channels_last))

    inner = [
        sample(hidden, c, 1, 1),
        sample(hidden),
        sample(hidden, 1, 3, 3),
        sample(hidden),
        sample(k, hidden, 1, 1),
    ]
    size = [(extent - 1) // stride + 1 for extent in image]
    scale = (
        torch.randint(1, 3, (k,)).to(dtype) if integers else sample(k)
    )  # never 0, which would hide all else
    tail = Tail(guarded(sample(k)), images(n, k, *size), guarded(scale), guarded(sample(k)), "none")
    return images(n, c, *image), ThreeLayers(*inner), tail


def computed(x, weights, *args, **kwargs):
    """By the kernel, from packed weights between bands of NaN."""
    packed = pack(weights)
    tensors = {name: guarded(t) for name, t in packed._asdict().items() if isinstance(t, torch.Tensor)}
    return inverted_residual(x, packed._replace(**tensors), *args, **kwargs)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Outputs start as NaN, so that an element which no block writes is seen."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *args: empty(x, *args).fill_(float("nan")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exact_on_integers(case, dtype):
    x, weights, tail = operands(case, dtype, integers=True)
    y = computed(x, weights, tail, stride=case[-1])
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, oracle.inverted_residual(x, weights, tail, case[-1]).value.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["skip", "stride_2_wide"])
@pytest.mark.parametrize("act", ACT)
def test_error_bound_with_each_activation(act, case, dtype):
    x, weights, tail = operands(CASES[case], dtype, integers=False)
    tail, stride = tail._replace(act=act), CASES[case][-1]
    y = computed(x, weights, tail, stride=stride, act_inner=act)
    assert_within(y, *oracle.inverted_residual(x, weights, tail, stride, act, sums=torch.float32))


@pytest.mark.parametrize("missing", ["bias", "residual", "scale", "shift"])
@pytest.mark.parametrize("case", ["skip", "odd_channels"])
def test_each_part_of_the_tail_may_be_absent(case, missing):
    x, weights, tail = operands(CASES[case], torch.float16, integers=True)
    for part in (tail._replace(**{missing: None}), NO_TAIL):
        y = computed(x, weights, part)
        assert torch.equal(y, oracle.inverted_residual(x, weights, part).value.half())


@pytest.mark.parametrize("moved", ["x", "residual"])
def test_images_that_lie_at_odd_addresses_give_the_same_bits(moved):
    """They are read value by value then."""
    x, weights, tail = operands(CASES["skip"], torch.float16, integers=False)
    wanted = computed(x, weights, tail)
    if moved == "x":
        x = guarded(x, GUARD + 1)
    else:
        tail = tail._replace(residual=guarded(tail.residual, GUARD + 1))
    assert torch.equal(computed(x, weights, tail), wanted)


def test_nan_stays_within_reach():
    """Of 3 x 3 outputs around it: not across tiles, and not into the padding of channels."""
    x, weights, _ = operands(CASES["many_blocks"], torch.float16, integers=False)
    x[0, 5, 8, 16] = float("nan")
    seen = computed(x, weights, act_inner="silu").isnan().any(1)
    assert seen.sum() == 9
    assert seen[0, 7:10, 15:18].all()


def test_an_empty_batch():
    x, weights, _ = operands(CASES["stride_2"], torch.float16, integers=True)
    assert computed(x[:0], weights, stride=2).shape == (0, 24, 8, 4)


def test_what_it_does_not_take_is_refused():
    x, weights, tail = operands(CASES["skip"], torch.float16, integers=True)
    packed = pack(weights)
    with pytest.raises(ValueError, match=r"x is .* expected .* channels_last"):
        inverted_residual(x.contiguous(), packed)
    with pytest.raises(ValueError, match=r"x is \[2, 23, .* expected \[2, 24,"):
        inverted_residual(x[:, :23], packed)
    with pytest.raises(ValueError, match=r"w3 is .* expected .* torch.bfloat16"):
        inverted_residual(
            x.bfloat16(),
            packed._replace(**{n: packed[i].bfloat16() for i, n in enumerate(packed._fields[:4])}),
        )
    with pytest.raises(ValueError, match=r"residual is .* expected \[2, 24, 5, 7\]"):
        inverted_residual(x, packed, tail, stride=2)
    with pytest.raises(ValueError, match="stride is 3, expected 1 or 2"):
        inverted_residual(x, packed, stride=3)
    with pytest.raises(ValueError, match="no activation 'swish'"):
        inverted_residual(x, packed, act_inner="swish")
    with pytest.raises(ValueError, match=r"w2 is \[144, 1, 3, 3\], expected \[143, 1, 3, 3\]"):
        pack(weights._replace(w1=weights.w1[:143], b1=weights.b1[:143]))
    with pytest.raises(ValueError, match="of 65 to 8 channels"):
        pack(operands((1, 65, (4, 4), 8, 8, 1), torch.float16, True)[1])
    double, weights, _ = operands(CASES["skip"], torch.float64, integers=True)
    with pytest.raises(ValueError, match="float64 on cpu"):
        inverted_residual(double, pack(weights))


def test_the_proof_counts_shared_memory_as_the_kernel_does(tmp_path):
    checks = tmp_path / "checks.cc"
    checks.write_text(
        f'#include "{SOURCE.resolve()}"\n'
        + "".join(
            f"static_assert(depthfuse::Block<{c}, {k}, {stride}>::kShared * 2 == {shared_bytes(c, stride)});\n"
            for c, k in SIZES
            for stride in (1, 2)
        )
    )
    run_compiler([*compiler_of("cpu"), "-fsyntax-only", str(checks)])


@pytest.mark.parametrize("arch", ["gfx908", "gfx90a", "sm_80"])
def test_it_compiles_for_gpus(arch, tmp_path):
    name = "hipcc" if arch.startswith("gfx") else "nvcc"
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}")
    made = tmp_path / "kernels.o"
    run_compiler([*compiler_of(arch), "-c", str(SOURCE), "-o", str(made)], HIP_PLATFORM="amd")
    assert made.stat().st_size > 100_000
