"""The time below which nothing can go on a device: arithmetic at full rate, or each byte moved once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from depthfuse.accelerate.cache import MeasuredCache
from depthfuse.timing import Timing, time_interleaved


@dataclass(frozen=True)
class Peaks:
    """What a device reaches at best in one dtype.

    matrix_tflops: of large matrix products. vector_tflops: of multiply-adds outside the matrix units, which depthwise
    convolution uses.
    """

    matrix_tflops: float
    vector_tflops: float
    bandwidth_gbps: float

    def least_ms(self, flops: float, bytes_moved: float, matrix: bool = True) -> float:
        """Milliseconds that `flops` (a multiply-add is 2) and `bytes_moved` take at least.

        Args:
            matrix: whether the matrix units can do the arithmetic.
        """
        tflops = self.matrix_tflops if matrix else self.vector_tflops
        return max(flops / tflops / 1e9, bytes_moved / self.bandwidth_gbps / 1e6)


@dataclass(frozen=True)
class Device:
    """Published peaks of one GPU (of one die, where a card has two)."""

    name: str
    fp16_tflops: float  # dense matrix units
    bf16_tflops: float
    fp32_tflops: float  # true float32 products: AMD's matrix units, NVIDIA's vector units
    vector_tflops: float  # float32
    bandwidth_gbps: float

    def peaks(self, dtype: torch.dtype) -> Peaks | None:
        """In float16, bfloat16 or float32; None for any other dtype."""
        rates = {
            torch.float16: self.fp16_tflops,
            torch.bfloat16: self.bf16_tflops,
            torch.float32: self.fp32_tflops,
        }
        return Peaks(rates[dtype], self.vector_tflops, self.bandwidth_gbps) if dtype in rates else None


# Vendors' data sheets; the H100's fp16 rate and bandwidth are what one sustained in a large product and a copy.
DEVICES = {
    "gfx908": Device("MI100", 184.6, 92.3, 46.1, 23.1, 1229),
    "gfx90a": Device("MI210", 181.0, 181.0, 45.3, 22.6, 1638),
    "gfx942": Device("MI300X", 1307.4, 1307.4, 163.4, 81.7, 5300),
    "sm_80": Device("A100 40GB", 312.0, 312.0, 19.5, 19.5, 1555),
    "sm_90": Device("H100 SXM", 800.0, 800.0, 66.9, 66.9, 3000),
}


def roofline_us(arch: str, flops: float, bytes_moved: float, dtype: torch.dtype, matrix: bool) -> float:
    """`Peaks.least_ms` of a GPU in microseconds. Raises KeyError for an unknown architecture or dtype."""
    peaks = DEVICES[arch].peaks(dtype)
    if peaks is None:
        raise KeyError(f"no peak of {arch} in {dtype} is known")
    return 1e3 * peaks.least_ms(flops, bytes_moved, matrix)


def peaks_of(device: torch.device, dtype: torch.dtype) -> Peaks | None:
    """The peaks of a device: of a GPU from the table by its architecture, of a CPU measured once and kept per user.

    Returns None for a GPU or a dtype that is not in the table.
    """
    cache = MeasuredCache(device)
    if device.type == "cuda":
        known = DEVICES.get(str(cache.environment["capability"]).partition(":")[0])
        return known.peaks(dtype) if known else None
    question = {"peaks": str(dtype)}
    answer = cache.get(question)
    if answer is None or answer.keys() != Peaks.__annotations__.keys():
        answer = asdict(_measure_cpu(dtype))
        cache.put(question, answer)
    return Peaks(**answer)


def _measure_cpu(dtype: torch.dtype) -> Peaks:
    """The rate of a large product, which also stands for the vector units', and of a copy that no cache holds."""
    side, latency_ms = 256, 0.0
    while side < 2048 and latency_ms < 20:  # some dtypes have no fast product
        side *= 2
        a, b = torch.ones(2, side, side, dtype=dtype).unbind()
        latency_ms = _time("product", functools.partial(torch.matmul, a, b)).least_ms
    tflops = 2 * side**3 / latency_ms / 1e9
    source, target = torch.ones(2, 2**24).unbind()  # 64 MiB each
    copy = _time("copy", lambda: target.copy_(source))
    return Peaks(tflops, tflops, 2 * source.nbytes / copy.least_ms / 1e6)


def _time(name: str, run: Callable[[], object]) -> Timing:
    return time_interleaved({name: run}, rounds=5, min_round_ms=10, warmup=1)[name]
