"""A latency table for a GPU that is not there: the time of each operation, plus its launch.

The time is the roofline's, a lower bound: no kernel reaches it, and small ones less than large ones. For the MI100 it
is divided by the share of it that kernels of that size reach in a simulation (`simulated.py`). Neither is a
measurement. The plan is the one of the plain backend, which fuses no whole blocks as Triton's kernels on a GPU do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration import accelerate
from depthfuse.acceleration.checking.profile import Counts, count_operations
from depthfuse.acceleration.planning.program import Call
from depthfuse.costs.simulated import launches, share_of_roofline
from depthfuse.costs.table import CostTable
from depthfuse.devices import OPTIONS, Device, Peaks
from depthfuse.errors import CostError
from depthfuse.log import progress
from depthfuse.merging.supernet import Supernet
from depthfuse.merging.variants import kept_copy, merged_model, variants_of
from depthfuse.spec import ModelSource

log = logging.getLogger(__name__)

LAUNCH_US = 2.0  # assumed: what an operation of a replayed graph takes beside its work


def predict_latencies(
    supernet: Supernet,
    input_size: tuple[int, int, int],
    device: str,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 1,
) -> CostTable:
    """Predict what each candidate of each block saves, in milliseconds; the same each time.

    Args:
        input_size: (C, H, W). device: one of `depthfuse.devices.OPTIONS`. dtype: float32, float16 or bfloat16.

    Raises CostError for an unknown device, or a dtype whose peak is not known.
    """
    conditions = predicted_conditions(supernet.source, input_size, device, dtype, batch_size)
    net = kept_copy(supernet).cpu().float()
    x = torch.zeros(1, *input_size)
    variants = variants_of(net, x)

    def predict_ms(choices: dict[str, str]) -> float:
        return _sum_ms(merged_model(net, choices), x, device, dtype, batch_size)

    with progress("predicted latency table", total=len(variants) + 1) as bar:
        whole_ms = predict_ms({})
        bar.advance()
        saved: dict[str, dict[str, float]] = {path: {} for path in net.blocks}
        for variant in variants:
            saved_ms = (whole_ms - predict_ms(variant.choices())) / len(variant.paths)
            for path in variant.paths:
                saved[path][variant.candidate] = saved_ms
            bar.advance()
    table = CostTable(conditions, "ms", whole_ms, saved)
    return replace(table, floor=table.cost(table.best()))  # no noise: sums are trusted


def predict_model_ms(
    model: nn.Module, input_size: tuple[int, int, int], device: str, dtype: torch.dtype, batch_size: int
) -> float:
    """The same for one model of any making. Raises CostError like `predict_latencies`."""
    x = torch.zeros(1, *input_size)
    return _sum_ms(model.cpu().float().eval(), x, device, dtype, batch_size)


def predicted_conditions(
    source: ModelSource, input_size: Iterable[int], device: str, dtype: torch.dtype, batch_size: int
) -> dict[str, Any]:
    """What a predicted table holds for. Raises CostError like `predict_latencies`."""
    return {
        "device": _target(device).name,
        "threads": None,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "input_size": list(input_size),
        "backend": "reference",
        "torch": torch.__version__,
        "model": source.name,
        "model_kwargs": json.loads(json.dumps(source.kwargs)),
        "predicted": True,
        "source": f"{_how(device, dtype)}, and {LAUNCH_US:g} us assumed for each operation",
    }


def _target(device: str) -> Device:
    if device not in OPTIONS:
        raise CostError(
            f"no peaks of {device!r} are known: latencies can be predicted for {', '.join(OPTIONS)}"
        )
    return OPTIONS[device]


def _peaks(device: str, dtype: torch.dtype) -> Peaks:
    peaks = _target(device).peaks(dtype)
    if peaks is None:
        raise CostError(f"no peak of {device} in {dtype} is known: take float32, float16 or bfloat16")
    return peaks


def _how(device: str, dtype: torch.dtype) -> str:
    """Where the times of operations come from, in words."""
    source = f"roofline, {_peaks(device, dtype).source}"
    simulated = launches(_target(device).arch, dtype)
    return f"simulated shares of the {source}" if simulated else source


def _counts(model: nn.Module, x: Tensor) -> list[Counts]:
    """Of the operations that a plan for `x` is made of."""
    fast = accelerate(model, x, backend="reference", verify=False, tune="off", dynamic=False)
    entries = fast.report().entries
    counts = count_operations(fast.made, Call.of((x,), {}))
    if len(counts) < len(entries):
        log.warning(
            "%d of %d operations cannot be counted: left out", len(entries) - len(counts), len(entries)
        )
    return [count for _, count in counts]


def _sum_ms(model: nn.Module, x: Tensor, device: str, dtype: torch.dtype, batch_size: int) -> float:
    """Predicted for `model` in `dtype` on a batch like the one image x, operation by operation."""
    peaks, simulated = _peaks(device, dtype), launches(_target(device).arch, dtype)
    one = _counts(model, x)
    # Arithmetic and bytes are straight lines in the batch size: two points give them for any.
    two = _counts(model, torch.cat([x, x])) if batch_size > 1 else one
    total_ms = 0.0
    for first, second in zip(one, two, strict=True):
        more = batch_size - 1
        flops = 2 * (first.macs + more * (second.macs - first.macs))
        bytes_moved = first.bytes_moved + more * (second.bytes_moved - first.bytes_moved)
        bytes_moved *= dtype.itemsize / x.element_size()
        share = share_of_roofline(simulated, flops, bytes_moved, first.matrix) or 1.0
        total_ms += peaks.least_ms(flops, bytes_moved, first.matrix) / share + LAUNCH_US / 1e3
    return total_ms
