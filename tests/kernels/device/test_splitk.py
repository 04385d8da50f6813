"""Split-K: the parts add up to the whole, in the same order at every run."""

import os
import re
import subprocess
import sys

import pytest
import torch

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.kernels.conv2d import conv2d
from depthfuse.kernels.counters import Counters
from depthfuse.kernels.device.tile import GemmConfig, _tiles, gemm_config
from depthfuse.kernels.launch import INTERPRETED, TARGETS
from depthfuse.kernels.linear import linear
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])


def config(splits):
    return GemmConfig(32, 32, 32, num_warps=2, splits=splits)


@pytest.fixture
def own_counters():
    """A buffer that the test's launches count on, one after another."""
    buffer = Counters()
    with buffer.in_use():
        yield buffer


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


def test_launches_leave_zeros_to_the_next(own_counters, device):
    """Tiles of one launch and of the next count on the same zeros, whatever their numbers of tiles and parts."""
    kind = {"dtype": torch.float32, "device": device}
    for rows, channels, splits in ((70, 64, 2), (3, 40, 8), (130, 7, 3), (70, 64, 2)):
        x, weight = integers(rows, 200, **kind), integers(channels, 200, **kind)
        y = linear(x, weight, config=config(splits))
        assert torch.equal(y.double(), oracle.linear(x, weight).value)
        zeros = own_counters.take(1, x.device)
        assert zeros.numel() >= 1024  # the launches counted on these: no other was made
        assert not zeros.any()


COMPILED = """
import sys, torch
from benchmarks.kernels.resources import compile_launch
from depthfuse.kernels import linear
from depthfuse.kernels.arguments import Tail
from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.launch import TARGETS
x, weight, y = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((64, 512), (64, 512), (64, 64)))
config = GemmConfig(32, 32, 32, num_warps=4, splits=4, nonkdim=16, kpack=2)
for arch in sys.argv[1:]:
    launch = linear.plan(x, weight, Tail(), y, norm_eps=None, config=config, target=TARGETS[arch])
    print("TARGET", arch, compile_launch(launch, TARGETS[arch]).asm["amdgcn"])
"""


def test_on_amd_every_wave_waits_for_its_stores_before_its_program_is_counted():
    """A barrier does not wait for stores there, and the counter's release only for those of the wave that counts."""
    targets = [name for name, target in TARGETS.items() if target.backend == "hip"]
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILED, *targets],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    assemblies = compiled.stdout.split("TARGET ")[1:]
    assert len(assemblies) == len(targets) >= 3
    for assembly in assemblies:
        before, _ = re.split(r"\n\s+global_atomic_add\b", assembly)
        after_stores = before.rpartition("buffer_store_dword")[2]
        order = re.findall(r"\n\s+(s_waitcnt [^\n]*\bvmcnt\(0\)|s_barrier)", after_stores)
        assert order[0].startswith("s_waitcnt"), assembly[:6]
        assert "s_barrier" in order, assembly[:6]


def test_grouped_convolution(device):
    kind = {"dtype": torch.float32, "device": device}
    x, weight = integers(1, 64, 4, 4, **kind), integers(48, 32, 3, 3, **kind)
    window = Window(padding=(1, 1), groups=2)
    y = conv2d(x, weight, window=window, config=config(4))
    assert torch.equal(y.double(), oracle.conv2d(x, weight, window=window).value)


@pytest.mark.parametrize(
    "tile", sorted({tile[:3] for t in TARGETS.values() for tile in _tiles(torch.float16, t)})
)
def test_every_tile_that_a_target_may_choose_is_exact(tile, device):
    """Those of 256 columns are finished half by half. Rows, columns and depth that the tile does not divide."""
    kind = {"dtype": torch.float16, "device": device}
    x, weight = integers(tile[0] + 5, 72, **kind), integers(tile[1] + 3, 72, **kind)
    tail = Tail(integers(tile[1] + 3, **kind), integers(tile[0] + 5, tile[1] + 3, **kind), act="relu")
    for splits in (1, 2):
        y = linear(x, weight, tail, config=GemmConfig(*tile, num_warps=4, splits=splits))
        assert torch.equal(y, oracle.linear(x, weight, tail).value.half())


def test_only_grids_smaller_than_the_chip_are_split():
    for target in TARGETS.values():
        small = gemm_config(49, 512, 4608, 1, torch.float16, target)
        large = gemm_config(128 * 3136, 64, 576, 1, torch.float16, target)
        assert small.splits > 1
        assert large.splits == 1
