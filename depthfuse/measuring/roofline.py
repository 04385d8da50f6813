"""The time below which nothing can go on a device: arithmetic at full rate, or each byte moved once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from depthfuse.devices import device_name
from depthfuse.measured_cache import MeasuredCache
from depthfuse.measuring.timing import Timing, time_interleaved


@dataclass(frozen=True)
class Peaks:
    """What a device reaches at best in one dtype.

    matrix_tflops: of large matrix products. vector_tflops: of multiply-adds outside the matrix units, which depthwise
    convolution uses. source: where the numbers come from, in words.
    """

    matrix_tflops: float
    vector_tflops: float
    bandwidth_gbps: float
    source: str

    def least_ms(self, flops: float, bytes_moved: float, matrix: bool = True) -> float:
        """Milliseconds that `flops` (a multiply-add is 2) and `bytes_moved` take at least.

        Args:
            matrix: whether the matrix units can do the arithmetic.
        """
        tflops = self.matrix_tflops if matrix else self.vector_tflops
        return max(flops / tflops / 1e9, bytes_moved / self.bandwidth_gbps / 1e6)


@dataclass(frozen=True)
class Device:
    """Published peaks of one GPU (of one die, where a card has two).

    driver_names: parts of the names by which the driver calls cards with these peaks.
    """

    name: str
    fp16_tflops: float  # dense matrix units
    bf16_tflops: float
    fp32_tflops: float  # true float32 products: AMD's matrix units, NVIDIA's vector units
    vector_tflops: float  # float32
    bandwidth_gbps: float
    driver_names: tuple[str, ...]

    def peaks(self, dtype: torch.dtype) -> Peaks | None:
        """In float16, bfloat16 or float32; None for any other dtype."""
        rates = {
            torch.float16: self.fp16_tflops,
            torch.bfloat16: self.bf16_tflops,
            torch.float32: self.fp32_tflops,
        }
        if dtype not in rates:
            return None
        return Peaks(rates[dtype], self.vector_tflops, self.bandwidth_gbps, f"peaks of {self.name}")


# Vendors' data sheets; the H100's fp16 rate and bandwidth are what one sustained in a large product and a copy.
DEVICES = {
    "gfx908": Device("MI100", 184.6, 92.3, 46.1, 23.1, 1229, ("MI100",)),
    "gfx90a": Device("MI210", 181.0, 181.0, 45.3, 22.6, 1638, ("MI210",)),
    "gfx942": Device("MI300X", 1307.4, 1307.4, 163.4, 81.7, 5300, ("MI300X",)),
    "sm_80": Device("A100 40GB", 312.0, 312.0, 19.5, 19.5, 1555, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "sm_90": Device("H100 SXM", 800.0, 800.0, 66.9, 66.9, 3000, ("H100 80GB HBM3",)),
}
_MEASURED = "peaks measured by a large product and a large copy"


def roofline_us(arch: str, flops: float, bytes_moved: float, dtype: torch.dtype, matrix: bool) -> float:
    """`Peaks.least_ms` of a GPU in microseconds. Raises KeyError for an unknown architecture or dtype."""
    peaks = DEVICES[arch].peaks(dtype)
    if peaks is None:
        raise KeyError(f"no peak of {arch} in {dtype} is known")
    return 1e3 * peaks.least_ms(flops, bytes_moved, matrix)


def peaks_of(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The peaks of a device in `dtype`: from the table where the driver's name is in it, else measured once a user.

    An architecture alone says little: an H200 has the H100's, and more bandwidth. Operators that fit a processor's
    caches can beat the measured copy, so that above 100 % of a measured roofline is possible.
    """
    if device.type == "cuda":
        name = device_name(device)
        for known in DEVICES.values():
            published = known.peaks(dtype)
            if published is not None and any(part in name for part in known.driver_names):
                return published
    cache = MeasuredCache.of(device)
    question = {"peaks": str(dtype)}
    answer = cache.get(question)
    if answer is None or answer.keys() != Peaks.__annotations__.keys():
        answer = asdict(_measure(device, dtype))
        cache.put(question, answer)
    return Peaks(**answer)


def _measure(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The rate of a large product, in `dtype` and (vector units) in float32, and of a copy that no cache holds."""
    matrix_tflops, vector_tflops = _product_tflops(device, dtype), _product_tflops(device, torch.float32)
    copied_bytes = 2**30 if device.type == "cuda" else 2**26
    source, target = torch.ones(2, copied_bytes // 4, device=device).unbind()
    copy = _time("copy", lambda: target.copy_(source))
    return Peaks(matrix_tflops, vector_tflops, 2 * source.nbytes / copy.least_ms / 1e6, _MEASURED)


def _product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    largest, enough_ms = (8192, 5) if device.type == "cuda" else (2048, 20)
    side, latency_ms = 256, 0.0
    while side < largest and latency_ms < enough_ms:  # some dtypes have no fast product
        side *= 2
        a, b = torch.ones(2, side, side, dtype=dtype, device=device).unbind()
        latency_ms = _time("product", functools.partial(torch.matmul, a, b)).least_ms
    return 2 * side**3 / latency_ms / 1e9


def _time(name: str, run: Callable[[], object]) -> Timing:
    return time_interleaved({name: run}, rounds=5, min_round_ms=10, warmup=1)[name]
