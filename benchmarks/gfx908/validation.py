"""The model of a compute unit's time beside what is published of the MI100: rates, bandwidths, products.

Instructions are given to the model directly for what one unit can do; for products our own kernels run, at the tiles of
those that were measured, whose code we do not have. Published rates of a card below its peak clock (Composable Kernel:
1,087 MHz) are compared as shares of the peak at that clock: what bounds them runs at the same clock, memory apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from benchmarks.gfx908.busy import CLOCK_MHZ, SIMDS
from benchmarks.gfx908.cycles import ComputeUnit, Parameters
from benchmarks.gfx908.network_cases import NetworkCase
from benchmarks.gfx908.times import simulated_us
from benchmarks.gfx908.trace import Event
from benchmarks.kernels.cases import Conv2dCase, LinearCase
from depthfuse.devices import DEVICES
from depthfuse.kernels.arguments import Tail
from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.launch import REORDERED

_DEVICE = DEVICES["gfx908"]
_CLOCKS_A_SECOND = CLOCK_MHZ * 1e6 * _DEVICE.compute_units  # of all compute units together
_SHEET = "AMD, MI100 data sheet"
_BENCHES = "RRZE-HPC/gpu-benches"
_KERNELS = "ROCm/composable_kernel, profiler/README.md"
_FAR = 1 << 40  # lines from what is read to what is written
_WAIT = Event("wait", waits=(0, 0))


@dataclass(frozen=True)
class Row:
    """One published figure and the model's.

    Attributes:
        deviation: how much more the model says, as a share of the published figure.
        remark: what is compared, where it is not the same thing.
    """

    what: str
    unit: str
    published: float
    simulated: float
    deviation: float
    source: str
    remark: str


def _row(what: str, unit: str, published: float, simulated: float, source: str, remark: str = "") -> Row:
    return Row(
        what, unit, published, round(simulated, 1), round(simulated / published - 1, 3), source, remark
    )


def _per_second(waves: list[list[Event]], amount: int, fresh: float = 0.0) -> float:
    """Billions a second of something of which each wave does an `amount`; one workgroup on each compute unit."""
    clocks = ComputeUnit(Parameters(), fresh).run([waves], resident=1)[-1]
    return len(waves) * amount / clocks * _CLOCKS_A_SECOND / 1e9


def _loads(count: int, first: int) -> list[Event]:
    """Loads of 16 bytes a lane, of lines that nobody has loaded before."""
    return [Event("memory", 16, tuple(range(16 * n, 16 * n + 16))) for n in range(first, first + count)]


def _stream(line: int, writes: bool) -> list[Event]:
    """A wave that computes an address, loads 8 bytes a lane, multiplies and, where it `writes`, stores them."""
    lines = tuple(range(line, line + 8))
    head = [Event("constant"), *[Event("scalar", 4)] * 4, _WAIT, *[Event("vector", 4)] * 6]
    tail = [Event("memory", 8, tuple(n + _FAR for n in lines), loads=False), _WAIT] if writes else []
    return [*head, Event("memory", 8, lines), _WAIT, Event("vector", 16), *tail]


def _tile(block_m: int, block_n: int, block_k: int, warps: int) -> GemmConfig:
    return GemmConfig(block_m, block_n, block_k, num_warps=warps, nonkdim=32, kpack=2, overlap=REORDERED)


def _share(what: str, found: NetworkCase, published: float, source: str, remark: str = "") -> Row:
    """Published and simulated share of the peak, in per cent."""
    peak = _DEVICE.fp16_tflops if found.dtype == "fp16" else _DEVICE.fp32_tflops
    time_us, _ = simulated_us(found)
    share = found.case.flops() / time_us / 1e6 / peak
    return _row(what, "% of peak", round(100 * published, 1), 100 * share, source, remark)


def peaks() -> Iterator[Row]:
    """Operations and bytes a second of units that always have work."""
    many = 500
    for what, event, flops, published in (
        ("matrix unit, fp16: 32 x 32 x 8", Event("matrix", 64), 16384, _DEVICE.fp16_tflops),
        ("matrix unit, bf16: 32 x 32 x 4", Event("matrix", 64), 8192, _DEVICE.bf16_tflops),
        ("matrix unit, fp32: 32 x 32 x 2", Event("matrix", 64), 4096, _DEVICE.fp32_tflops),
        ("vector unit, fp32 multiply-adds", Event("vector", 4), 128, _DEVICE.vector_tflops),
    ):
        rate = _per_second([[event] * many] * 2 * SIMDS, many * flops)
        yield _row(what, "TFLOP/s", published, rate / 1e3, _SHEET)
    reads = [[Event("lds", 8)] * many + [_WAIT]] * 2 * SIMDS
    yield _row(
        "LDS",
        "GB/s",
        21579,
        _per_second(reads, many * 1024),
        "ROCm/rocm-amdgpu-bench#4",
        "128 bytes a clock are the peak",
    )
    again = [Event("memory", 16, tuple(range(16))), *[Event("memory", 16, tuple(range(16)))] * many, _WAIT]
    yield _row(
        "first cache", "GB/s", 10290, _per_second([again] * 2 * SIMDS, many * 1024), f"{_BENCHES}, gpu-cache"
    )
    for what, fresh, published, name in (
        ("second cache", 0.0, 2726, "gpu-l2-cache"),
        ("memory, copy", 1.0, 1043, "gpu-stream"),
    ):
        waves = [[*_loads(many, wave * many), _WAIT] for wave in range(2 * SIMDS)]
        yield _row(
            what,
            "GB/s",
            published,
            _per_second(waves, many * 1024, fresh),
            f"{_BENCHES}, {name}",
            "a parameter",
        )


def streams() -> Iterator[Row]:
    """Two workgroups a compute unit, whose threads read (and write) 8 bytes each and end: what latency leaves."""
    for what, writes, published in (
        ("read", False, {64: 194, 128: 352, 256: 685, 512: 1094}),
        ("scale", True, {64: 281, 128: 487, 256: 840, 512: 1035}),
    ):
        for threads, figure in published.items():
            groups = [
                [_stream(1000 * n + 8 * wave, writes) for wave in range(threads // 64)] for n in range(40)
            ]
            moved = 40 * threads * 8 * (2 if writes else 1)
            rate = moved / ComputeUnit(Parameters(), 1.0).run(groups, resident=2)[-1]
            yield _row(
                f"memory, {what}, 2 x {threads} threads a compute unit",
                "GB/s",
                figure,
                rate * _CLOCKS_A_SECOND / 1e9,
                f"{_BENCHES}, gpu-stream",
            )


def products() -> Iterator[Row]:
    """Our kernels at the tiles of published ones, as a share of the peak at the clock of each."""
    for block_m, block_n, block_k, warps, published, threads in (
        (256, 128, 32, 8, 103.0, 256),
        (128, 128, 64, 8, 101.6, 256),
        (128, 64, 32, 4, 79.5, 256),
        (64, 64, 32, 4, 57.7, 64),
        (128, 32, 64, 4, 50.0, 128),
        (64, 32, 64, 2, 43.2, 64),
    ):
        case = TiledConv2d(128, 192, 71, 256, 3, 2, 1, config=_tile(block_m, block_n, block_k, warps))
        found = NetworkCase("", case, {8: replace(case, batch=8)}, 128, "fp16", [])
        yield _share(
            f"3x3 convolution, 192 to 256 channels, stride 2, tiles of {block_m} x {block_n}",
            found,
            published / 133.5,
            _KERNELS,
            f"theirs has {threads} threads",
        )
    single = TiledConv2d(
        128, 192, 71, 256, 3, 2, 1, config=GemmConfig(128, 128, 32, 8, 8, 2, 1, 32, 1, REORDERED)
    )
    found = NetworkCase("", single, {8: replace(single, batch=8)}, 128, "fp32", [])
    yield _share(
        "the same, fp32",
        found,
        33.08 / 33.4,
        "ROCm/composable_kernel, example/09_convnd_fwd/README.md",
        "128 x 128 tiles",
    )
    large = TiledLinear(3840, 4096, 4096, config=_tile(256, 128, 32, 8))
    found = NetworkCase("", large, {1: TiledLinear(480, 4096, 4096, config=large.config)}, 8, "fp16", [])
    yield _share("product 3840 x 4096 x 4096, tiles of 256 x 128", found, 107.98 / 133.5, _KERNELS)
    tall = LinearCase(512, 4096, 4096)
    found = NetworkCase("", tall, {1: tall}, 1, "fp16", [])
    yield _share(
        "product 512 x 4096 x 4096",
        found,
        91 / 184.6,
        "ROCm/Tensile#2087",
        "rocBLAS; ours at the tile of its heuristic",
    )


def rows() -> Iterator[Row]:
    yield from peaks()
    yield from streams()
    yield from products()


@dataclass(frozen=True)
class TiledConv2d(Conv2dCase):
    """A convolution at a given tile."""

    config: GemmConfig = field(default=GemmConfig(128, 128, 32))

    def launches(self, dtype, target):
        from depthfuse.kernels import conv2d

        x, weight, *tail = self.operands(dtype, "meta").values()
        options = {"config": self.config, "target": target}
        return [conv2d.plan(x, weight, Tail(*tail, self.act), self._output(x), self._window(), **options)]

    def ours(self, x, weight, bias, residual, scale, shift):
        from depthfuse.kernels.conv2d import conv2d

        tail = Tail(bias, residual, scale, shift, self.act)
        return conv2d(x, weight, tail, self._window(), config=self.config)


@dataclass(frozen=True)
class TiledLinear(LinearCase):
    """A linear layer at a given tile."""

    config: GemmConfig = field(default=GemmConfig(128, 128, 32))

    def launches(self, dtype, target):
        from depthfuse.kernels import linear

        x, weight, *tail = self.operands(dtype, "meta").values()
        y = torch.empty(self.rows, self.out_channels, dtype=dtype, device="meta")
        options = {"norm_eps": None, "config": self.config, "target": target}
        return [linear.plan(x, weight, Tail(*tail, self.act), y, **options)]

    def ours(self, x, weight, bias, residual, scale, shift):
        from depthfuse.kernels.linear import linear

        return linear(x, weight, Tail(bias, residual, scale, shift, self.act), config=self.config)
