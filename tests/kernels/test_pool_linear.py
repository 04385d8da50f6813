"""Pool and classifier, in one launch and in two: exact on integers, within the error bound on reals."""

import pytest
import torch

from depthfuse.kernels import pool_linear as module
from depthfuse.kernels.launch import INTERPRETED, TARGETS
from depthfuse.kernels.pool_linear import PoolLinearConfig, config_for, pool_linear
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within, guarded

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
    for given in (bias, None):
        exact = oracle.pool_linear(x, weight, given).value
        assert torch.equal(pool_linear(x, weight, given, config=config), exact.to(dtype))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_bound(case, dtype, norm_eps, config, device):
    x, weight, bias = operands(case, dtype, device)
    y = pool_linear(x, weight, bias, norm_eps=norm_eps, config=config)
    assert_within(y, *oracle.pool_linear(x, weight, bias, norm_eps, sums=torch.float32))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_large_common_offset_does_not_hurt_the_norm(config, device):
    x, weight, bias = operands(CASES["7x7"], torch.float32, device)
    y = pool_linear(x + 64, weight, bias, norm_eps=1e-6, config=config)
    exact, _ = oracle.pool_linear(x + 64, weight, bias, 1e-6)
    assert ((y - exact).abs().max() / exact.abs().max()) < 64 * 130 * 2**-24


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


def test_a_bad_layout_is_named(device):
    x, weight, bias = operands(CASES["odd"], torch.float32, device)
    with pytest.raises(ValueError, match="x .* expected channels_last"):
        pool_linear(x.contiguous(), weight, bias)
    with pytest.raises(ValueError, match="weight .* has strides .* expected contiguous"):
        pool_linear(x, weight.T.contiguous().T, bias)
