"""Pool and classifier, in one launch and in two: exact on integers, within the error bound on reals."""

import pytest
import torch
import torch.nn.functional as F

from depthfuse.kernels import pool_linear as module
from depthfuse.kernels.launch import INTERPRETED, TARGETS
from depthfuse.kernels.pool_linear import PoolLinearConfig, config_for, pool_linear
from tests.kernels.oracle import assert_within, forward_error, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])
CONFIGS = {"fused": PoolLinearConfig(True), "two_launches": PoolLinearConfig(False)}

# batch, channels, (height, width), classes
CASES = {
    "7x7": (2, 130, (7, 7), 21),
    "odd": (3, 33, (5, 3), 10),
    "one_pixel": (2, 16, (1, 1), 8),
    "one_class": (1, 48, (2, 3), 1),
    "many_pixels": (1, 8, (13, 14), 9),
}


def operands(case, dtype, device):
    n, c, image, k = case
    x = torch.randn(n, c, *image).to(device, dtype).contiguous(memory_format=torch.channels_last)
    return [guarded(t) for t in (x, torch.randn(k, c).to(device, dtype), torch.randn(k).to(device, dtype))]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_integers(dtype, config, device):
    """64 pixels of small integers: the mean of each channel is exact, and so are the few products of the sum."""
    x = torch.randint(-1, 2, (2, 40, 8, 8)).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randint(-1, 2, (11, 40)), torch.randint(-3, 4, (11,))
    x, weight, bias = (guarded(t.to(device, dtype)) for t in (x, weight, bias))
    exact = F.linear(x.double().mean((2, 3)), weight.double(), bias.double())
    y = pool_linear(x, weight, bias, config=config)
    assert torch.equal(y, exact.to(dtype))
    assert torch.equal(pool_linear(x, weight, config=config), (exact - bias.double()).to(dtype))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_bound(case, dtype, norm_eps, config, device):
    x, weight, bias = operands(case, dtype, device)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    mean = x.double().mean((2, 3))
    magnitude = x.double().abs().mean((2, 3)) + mean.abs()
    if norm_eps is not None:
        deviation = (mean.var(1, keepdim=True, unbiased=False) + norm_eps).sqrt()
        # An error of the means enters directly, through their mean, and through their deviation.
        magnitude = (magnitude + mean.abs().amax(1, keepdim=True) * 3) / deviation
        mean = F.layer_norm(mean, (channels,), eps=norm_eps)
    exact = F.linear(mean, weight.double(), bias.double())
    reach = magnitude @ weight.double().abs().T
    bound = forward_error(channels + pixels, reach, exact, bias, None, None, None, dtype)
    # In two launches the means, and the normalised means, are rounded to the dtype between them.
    rounding = 0 if config.fused else 2 * torch.finfo(dtype).eps
    assert_within(
        pool_linear(x, weight, bias, norm_eps=norm_eps, config=config), exact, bound + rounding * reach
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_large_common_offset_does_not_hurt_the_norm(config, device):
    x, weight, bias = operands(CASES["7x7"], torch.float32, device)
    moved = pool_linear(x + 64, weight, bias, norm_eps=1e-6, config=config)
    exact = F.linear(
        F.layer_norm((x + 64).double().mean((2, 3)), (130,), eps=1e-6), weight.double(), bias.double()
    )
    assert ((moved - exact).abs().max() / exact.abs().max()) < 64 * 130 * 2**-24


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_64_bit_offsets_and_repeated_runs_give_the_same_bits(config, device, monkeypatch):
    x, weight, bias = operands(CASES["odd"], torch.float16, device)
    first = pool_linear(x, weight, bias, config=config)
    assert torch.equal(pool_linear(x, weight, bias, config=config), first)
    for owner in (module, module.linear):
        monkeypatch.setattr(owner, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(pool_linear(x, weight, bias, config=config), first)


def test_empty_batch(device):
    x, weight, bias = operands(CASES["odd"], torch.float16, device)
    for config in CONFIGS.values():
        assert pool_linear(x[:0], weight, bias, config=config).shape == (0, 10)


def test_large_batches_take_two_launches():
    for target in TARGETS.values():
        assert config_for(1, 49, 512, 1000, torch.float16, target).fused
        assert not config_for(128, 49, 512, 1000, torch.float16, target).fused


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"weight": (5, 7)}, r"x \[1, 8, 4, 4\] and weight \[5, 7\] do not fit"),
        ({"x": (1, 8, 0, 4)}, "with at least one pixel"),
        ({"bias": (4,)}, r"bias has shape \[4\] .* expected contiguous \[5\]"),
    ],
)
def test_bad_input_is_named(shapes, message, device):
    shapes = {"x": (1, 8, 4, 4), "weight": (5, 8), "bias": (5,)} | shapes
    arguments = {k: torch.zeros(v, device=device) for k, v in shapes.items()}
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=message):
        pool_linear(**arguments)
