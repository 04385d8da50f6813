"""Split-K: the parts add up to the whole, in the same order at every run."""

import pytest
import torch

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.kernels.conv2d import conv2d
from depthfuse.kernels.device.tile import GemmConfig, gemm_config
from depthfuse.kernels.launch import INTERPRETED, TARGETS
from depthfuse.kernels.linear import linear
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])


def config(splits):
    return GemmConfig(32, 32, 32, num_warps=2, splits=splits)


def integers(*shape, dtype, device):
    x = torch.randint(-3, 4, shape).to(device, dtype)
    return guarded(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("channels", [64, 5])
def test_convolution_is_exact_on_integers(channels, splits, dtype, device):
    """Tap by tap and flat; 8 parts of the flat reduction's 2 steps leave some parts empty."""
    kind = {"dtype": dtype, "device": device}
    x, weight = integers(2, channels, 4, 5, **kind), integers(40, channels, 3, 3, **kind)
    tail = [integers(40, **kind), integers(2, 40, 4, 5, **kind), integers(40, **kind), integers(40, **kind)]
    tail, window = Tail(*tail, "relu"), Window(padding=(1, 1))
    y = conv2d(x, weight, tail, window, config=config(splits))
    assert torch.equal(y, oracle.conv2d(x, weight, tail, window).value.to(dtype))


@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_linear_is_within_its_error_bound(norm_eps, device):
    x, weight, bias = torch.randn(7, 200), torch.randn(33, 200), torch.randn(33)
    x, weight, bias = (guarded(t.to(device)) for t in (x, weight, bias))
    first = linear(x, weight, Tail(bias), norm_eps=norm_eps, config=config(4))
    assert_within(first, *oracle.linear(x, weight, Tail(bias), norm_eps, sums=torch.float32))
    assert torch.equal(linear(x, weight, Tail(bias), norm_eps=norm_eps, config=config(4)), first)


def test_grouped_convolution(device):
    kind = {"dtype": torch.float32, "device": device}
    x, weight = integers(1, 64, 4, 4, **kind), integers(48, 32, 3, 3, **kind)
    window = Window(padding=(1, 1), groups=2)
    y = conv2d(x, weight, window=window, config=config(4))
    assert torch.equal(y.double(), oracle.conv2d(x, weight, window=window).value)


def test_only_grids_smaller_than_the_chip_are_split():
    for target in TARGETS.values():
        small = gemm_config(49, 512, 4608, 1, torch.float16, target)
        large = gemm_config(128 * 3136, 64, 576, 1, torch.float16, target)
        assert small.splits > 1
        assert large.splits == 1
