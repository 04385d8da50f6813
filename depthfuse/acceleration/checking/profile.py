"""What each operation of a plan costs: latency before and after, multiply-accumulates, bytes, and the roofline's time.

Where the native engine runs the whole, it says what each took. Elsewhere operations are timed one after another as the
plan runs them op by op, because only so can they be told apart: where oneDNN Graph, another project's engine or a
captured graph runs the whole, the sum is not its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.acceleration.planning.own import main_dtype
from depthfuse.acceleration.planning.parts import CallByCall, Given, parts_given, programs_given
from depthfuse.acceleration.planning.plan import Cost, Entry, Plan
from depthfuse.acceleration.planning.program import Call, CaptureError
from depthfuse.fused.layers import FusedConv2d, plain_ops
from depthfuse.measuring.roofline import peaks_of

# (inputs, passes) -> for each step of an engine the names of the operations that it computes, and its least time in ms:
# 0 for one that runs with the next that takes more
EngineTimes = Callable[[Sequence[Tensor], int], list[tuple[tuple[str, ...], float]]]


def profile_entries(
    plan: Plan,
    entries: tuple[Entry, ...],
    call: Call,
    model: nn.Module | None,
    passes: int,
    engine: EngineTimes | None = None,
) -> tuple[Entry, ...]:
    """`entries` of `plan` with their costs on `call`, which is in the plan's dtypes.

    Args:
        engine: tells the times of what runs the whole plan for this call, where that can tell. Operations that it runs
            as one share their time as their rooflines do.
        model: what the plan was made from, for the latencies before; None to leave them out.
        passes: how often everything runs; the least time of each operation counts.

    Raises:
        ValueError: `model` is another than the plan's.
    """
    parts = parts_given(plan, call)
    peaks = peaks_of(plan.device, plan.dtype)
    costs: dict[tuple[str, str], Cost] = {}
    for name, given in parts.items():
        shown = {entry.node for entry in entries if entry.part == name}  # views are not
        counts = {node: count for node, count in _count(given).items() if node in shown}
        roofline_ms = {
            node: peaks.least_ms(2 * count.macs, count.bytes_moved, count.matrix)
            for node, count in counts.items()
        }
        if engine is None:
            latency_ms = _least_latencies(given, plan.device, passes)
        else:
            latency_ms = _latencies_in_engine(engine, given, roofline_ms, passes)
        for node, count in counts.items():
            cost = Cost(latency_ms[node], None, count.macs, count.bytes_moved, roofline_ms[node])
            costs[name, node] = cost
    before = {} if model is None else _latencies_before(plan, model, tuple(parts), call, passes)
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


def count_operations(plan: Plan, call: Call) -> list[tuple[Entry, Counts]]:
    """What `profile_entries` counts, without any timing, with each entry that is a call in a graph, in order.

    Views, which compute nothing, are no entries. Args: as for `profile_entries`.
    """
    counts = {
        (name, node): count
        for name, given in parts_given(plan, call).items()
        for node, count in _count(given).items()
    }
    known = [entry for entry in plan.entries if (entry.part, entry.node) in counts]
    return [(entry, counts[entry.part, entry.node]) for entry in known]


def _latencies_before(
    plan: Plan, model: nn.Module, parts: tuple[str, ...], call: Call, passes: int
) -> dict[str, dict[str, float]]:
    """For each part, the latency in ms of each node of the model's own graph."""
    main = main_dtype(model)
    if main is not None:
        call = Call(tuple(x.to(main) if x.dtype == plan.dtype else x for x in call.tensors), call.tree)
    try:
        theirs = programs_given(model, parts, call, plan.is_dynamic)
    except KeyError as error:
        raise ValueError(
            f"{type(model).__name__} has no module {error}: profile takes the model that was accelerated"
        ) from error
    except CaptureError as error:
        raise ValueError(
            f"{type(model).__name__} takes no such input ({error}): profile takes the model that was accelerated"
        ) from error
    return {part: _least_latencies(given, plan.device, passes) for part, given in theirs.items()}


def _latencies_in_engine(
    engine: EngineTimes, given: Given, roofline_ms: Mapping[str, float], passes: int
) -> dict[str, float]:
    """For each operation the latency in ms: 0 for one that the engine has no need of. Together they are a whole run.

    What runs as one shares its time. Moves that are no operation of the plan belong to what came before them, those of
    inputs to what comes first.
    """
    latency_ms = dict.fromkeys(roofline_ms, 0.0)
    together: list[str] = []
    waiting_ms = 0.0

    def share() -> None:
        whole_ms = sum(roofline_ms[name] for name in together)
        for name in together:
            latency_ms[name] += waiting_ms * roofline_ms[name] / whole_ms

    ended = False
    for names, took_ms in engine(given.inputs, passes):
        counted = [name for name in names if name in roofline_ms]
        if ended and counted:
            share()
            together, waiting_ms, ended = [], 0.0, False
        together.extend(name for name in counted if name not in together)
        waiting_ms += took_ms
        ended = took_ms > 0.0 and bool(together)
    share()
    return latency_ms


@torch.no_grad()
def _least_latencies(given: Given, device: torch.device, passes: int) -> dict[str, float]:
    mark, between_ms = _clock(device)
    least_ms: dict[str, float] = {}
    for index in range(passes + 1):  # the first one warms up
        marks: dict[str, tuple] = {}

        def timed(node, args, kwargs, call, marks=marks):
            start = mark()
            value = call()
            marks[node.name] = (start, mark())
            return value

        CallByCall(given.graph, timed).run(*given.clones())
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
def _count(given: Given) -> dict[str, Counts]:
    """By the name of each call."""
    counts = {}

    def counted(node, args, kwargs, call):
        # The plain ops are those that PyTorch can count.
        with plain_ops(), FlopCounterMode(display=False) as counter:
            value = call()
        module = given.graph.get_submodule(node.target) if node.op == "call_module" else None
        own = [] if module is None else [*module.parameters(), *module.buffers()]
        tensors = _unique([*_tensors_in((args, kwargs)), *own, *_tensors_in(value)])
        depthwise = isinstance(module, FusedConv2d) and module.weight.shape[1] == 1 and module.groups > 1
        macs = counter.get_total_flops() // 2
        counts[node.name] = Counts(macs, sum(t.nbytes for t in tensors), not depthwise)
        return value

    CallByCall(given.graph, counted).run(*given.clones())
    return counts


def _tensors_in(value: object) -> list[Tensor]:
    """The tensors among the arguments or the results of an operator."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())
