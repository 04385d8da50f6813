"""What each operation of a plan costs: latency before and after, multiply-accumulates, bytes, and the roofline's time.

Operations are timed one after another as the plan runs them op by op, because only so can they be told apart: where
oneDNN Graph or a captured graph runs the whole, the sum is not its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.acceleration.planning.build import trace_simplified
from depthfuse.acceleration.planning.parts import CallByCall, cast, first_inputs, parts_of, tensors_in
from depthfuse.acceleration.planning.plan import Cost, Entry
from depthfuse.fused.layers import FusedConv2d, plain_ops
from depthfuse.measuring.roofline import peaks_of


def profile_entries(
    plan: nn.Module,
    entries: tuple[Entry, ...],
    inputs: tuple[Tensor, ...],
    model: nn.Module | None,
    passes: int,
) -> tuple[Entry, ...]:
    """`entries` of `plan` with their costs on `inputs`, in the plan's dtype.

    Args:
        model: what the plan was made from, for the latencies before; None to leave them out.
        passes: how often everything runs; the least time of each operation counts.

    Raises:
        ValueError: `model` is another than the plan's.
    """
    parts = parts_of(plan)
    ours = first_inputs(plan, parts, inputs)
    peaks = peaks_of(inputs[0].device, inputs[0].dtype)
    costs: dict[tuple[str, str], Cost] = {}
    for name in parts.keys() & ours.keys():
        latency_ms = _least_latencies(parts[name], ours[name], passes)
        for node, (macs, bytes_moved, matrix) in _count(parts[name], ours[name]).items():
            roofline_ms = peaks.least_ms(2 * macs, bytes_moved, matrix)
            costs[name, node] = Cost(latency_ms[node], None, macs, bytes_moved, roofline_ms)
    before = {} if model is None else _latencies_before(model, tuple(parts), inputs, passes)
    profiled = []
    for entry in entries:
        cost = costs.get((entry.part, entry.node))
        if cost is not None and entry.part in before:
            nodes = before[entry.part]
            unknown = [node for node in entry.nodes if node not in nodes]
            if unknown:
                raise ValueError(
                    f"{type(model).__name__} has no operation {unknown[0]!r}: profile takes the model that was "
                    "accelerated"
                )
            cost = replace(cost, before_ms=sum(nodes[node] for node in entry.nodes))
        profiled.append(replace(entry, cost=cost))
    return tuple(profiled)


class Counts(NamedTuple):
    """Multiply-accumulates and bytes moved of one operation, and whether matrix units can do it."""

    macs: int
    bytes_moved: int
    matrix: bool


def count_operations(plan: nn.Module, entries: tuple[Entry, ...], inputs: tuple[Tensor, ...]) -> list[Counts]:
    """What `profile_entries` counts, without any timing: for each of `entries` that is a call in a graph, in order.

    Views, which compute nothing, are no entries. Args: as for `profile_entries`.
    """
    parts = parts_of(plan)
    counts = {
        (name, node): count
        for name, given in first_inputs(plan, parts, inputs).items()
        for node, count in _count(parts[name], given).items()
    }
    return [counts[entry.part, entry.node] for entry in entries if (entry.part, entry.node) in counts]


def _latencies_before(
    model: nn.Module, parts: tuple[str, ...], inputs: tuple[Tensor, ...], passes: int
) -> dict[str, dict[str, float]]:
    """For each part, the latency in ms of each node of the model's own graph."""
    layers = dict(model.named_modules())
    missing = [part for part in parts if part not in layers]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no module {missing[0]!r}: profile takes the model that was accelerated"
        )
    theirs = first_inputs(model, {part: layers[part] for part in parts}, cast(inputs, model))
    return {
        part: _least_latencies(trace_simplified(layers[part]), given, passes)
        for part, given in theirs.items()
    }


@torch.no_grad()
def _least_latencies(graph: fx.GraphModule, inputs: tuple[Tensor, ...], passes: int) -> dict[str, float]:
    mark, between_ms = _clock(inputs[0].device)
    least_ms: dict[str, float] = {}
    for index in range(passes + 1):  # the first one warms up
        marks: dict[str, tuple] = {}

        def timed(node, args, kwargs, call, marks=marks):
            start = mark()
            value = call()
            marks[node.name] = (start, mark())
            return value

        CallByCall(graph, timed).run(*(x.clone() for x in inputs))
        if index:
            for name, (start, end) in marks.items():
                least_ms[name] = min(least_ms.get(name, float("inf")), between_ms(start, end))
    return least_ms


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """(mark, between_ms): of a GPU its own clock, launches from Python included where it waits for them."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: (end - start) * 1e3

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return mark, between_ms


@torch.no_grad()
def _count(graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, Counts]:
    """By the name of each call."""
    counts = {}

    def counted(node, args, kwargs, call):
        # The plain ops are those that PyTorch can count.
        with plain_ops(), FlopCounterMode(display=False) as counter:
            value = call()
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        own = [] if module is None else [*module.parameters(), *module.buffers()]
        tensors = _unique([*tensors_in((args, kwargs)), *own, *tensors_in(value)])
        depthwise = isinstance(module, FusedConv2d) and module.weight.shape[1] == 1 and module.groups > 1
        macs = counter.get_total_flops() // 2
        counts[node.name] = Counts(macs, sum(t.nbytes for t in tensors), not depthwise)
        return value

    CallByCall(graph, counted).run(*(x.clone() for x in inputs))
    return counts


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())
