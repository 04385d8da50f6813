"""The time below which nothing can go on a device: arithmetic at full rate, or each byte moved once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict

import torch

from depthfuse.devices import DEVICES, Peaks, device_name
from depthfuse.measured_cache import MeasuredCache
from depthfuse.measuring.timing import Timing, time_interleaved

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
    copy = _time("copy", lambda: target.copy_(source), device)
    return Peaks(matrix_tflops, vector_tflops, 2 * source.nbytes / copy.least_ms / 1e6, _MEASURED)


def _product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    largest, enough_ms = (8192, 5) if device.type == "cuda" else (2048, 20)
    side, latency_ms = 256, 0.0
    while side < largest and latency_ms < enough_ms:  # some dtypes have no fast product
        side *= 2
        a, b = torch.ones(2, side, side, dtype=dtype, device=device).unbind()
        latency_ms = _time("product", functools.partial(torch.matmul, a, b), device).least_ms
    return 2 * side**3 / latency_ms / 1e9


def _time(name: str, run: Callable[[], object], device: torch.device) -> Timing:
    return time_interleaved({name: run}, rounds=5, min_round_ms=10, warmup=1, device=device)[name]
