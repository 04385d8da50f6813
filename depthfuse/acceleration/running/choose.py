"""Choose how a plan runs as a whole: op by op, through oneDNN Graph, a few images at a time, or not at all.

The last one is the promise that the result is never slower: where the model itself was measured to be faster than its
plan, a copy of the model runs.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.running.cuda_graphs import GraphCache
from depthfuse.acceleration.running.execution import EAGER, Execution, Executor
from depthfuse.acceleration.running.implementations import (
    bind_implementations,
    choose_chunk,
    choose_implementations,
    clearly_faster,
    images_are_independent,
    least_ms,
)
from depthfuse.acceleration.running.onednn_graph import compile_plan
from depthfuse.fused.layers import FusedModule
from depthfuse.measured_cache import MeasuredCache
from depthfuse.measuring.timing import Timing, time_interleaved
from depthfuse.merging.tracing import has_hooks

logger = logging.getLogger(__name__)

ACCELERATED = "accelerated"
_ROUNDS, _ROUNDS_IF_CLOSE = 5, 15
_CLOSE = 1.1  # within this ratio a few rounds decide by chance
_ROUND_MS = 20.0

Finish = Callable[[Executor], Callable[..., object]]


def choose(
    plan: Plan,
    model: nn.Module | None,
    inputs: tuple[Tensor, ...],
    tune: str,
    finish: Finish = lambda executor: executor,
) -> Executor:
    """Choose what runs each operation of a plan, and the whole, for inputs like `inputs`.

    Args:
        model: what the plan was made from, in evaluation mode, to be compared with; None where it is not at hand.
        inputs: in the plan's dtype.
        tune: see `depthfuse.accelerate`.
        finish: makes of an executor what the caller will call in the end; that is what is compared with the model.
    """
    choose_implementations(plan.module, inputs, "heuristic" if tune == "measure" else tune)
    if tune == "measure" and worth_measuring(plan, inputs):
        return _choose_by_measurement(plan, model, inputs, MeasuredCache.of(plan.device), finish)
    graphs = None if tune == "off" else _graphs(plan, inputs)
    return Executor(plan.module, Execution(graphs=graphs is not None), graphs=graphs)


def restore(
    plan: Plan, execution: Execution, inputs: tuple[Tensor, ...], implementations: Mapping[str, str]
) -> Executor:
    """What was chosen before for the same plan in the same environment. The model itself is not at hand any more.

    Args:
        implementations: of each fused module, by its path in the plan.

    Raises ValueError for an implementation that is none here.
    """
    part = execution.part(inputs)
    bind_implementations(plan.module, part, implementations)
    compiled = _compile(plan, part, measure=False) if execution.compiled else None
    graphs = _graphs(plan, inputs) if execution.graphs else None
    execution = replace(execution, compiled=compiled is not None, graphs=graphs is not None, eager=None)
    return Executor(plan.module, execution, compiled, _shapes(part), graphs=graphs)


def _choose_by_measurement(
    plan: Plan, model: nn.Module | None, inputs: tuple[Tensor, ...], cache: MeasuredCache, finish: Finish
) -> Executor:
    """By measurement, or by what was measured before."""
    question = {
        "plan": fingerprint(plan.module),
        "inputs": [[list(x.shape), str(x.dtype)] for x in inputs],
        "compared": model is not None,
    }
    known = Execution.from_document(cache.get(question))
    on_cpu = plan.device.type == "cpu"
    if known is not None:
        chunk = known.chunk
    else:
        chunk = choose_chunk(plan.module, inputs) if on_cpu else None
    execution = Execution(chunk=chunk)
    part = execution.part(inputs)
    choose_implementations(plan.module, part, "measure", cache)
    graphs = _graphs(plan, inputs)
    compiled = None
    if on_cpu and (known is None or known.compiled):
        compiled = _compile(plan, part, measure=known is None)
    execution = replace(execution, compiled=compiled is not None, graphs=graphs is not None)
    executor = Executor(plan.module, execution, compiled, _shapes(part), graphs=graphs)
    if known is not None:
        execution = known
    else:
        if model is not None:
            execution = _compare(execution, plan, model, inputs, finish(executor))
        cache.put(question, execution.document())
    eager = None
    if execution.eager is not None and model is not None:
        eager = _own(model, execution.eager, plan.dtype).__call__
    return replace(executor, execution=execution, eager=eager)


def _shapes(inputs: tuple[Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(x.shape) for x in inputs)


def _graphs(plan: Plan, inputs: tuple[Tensor, ...]) -> GraphCache | None:
    """On a GPU, and only there: the plan's launches as one graph for each input shape."""
    if plan.device.type != "cuda" or _is_watched(plan.module):
        return None
    pairs = tuple(torch.cat([x[:1], x[:1].flip(-1)]) for x in inputs if x.dim() and x.shape[0])
    batchwise = len(pairs) == len(inputs) and images_are_independent(plan.module, pairs, 1)
    return GraphCache(plan.module, batchwise)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks must run at every call, which a compiled copy or a replay would not do."""
    return any(has_hooks(m) for m in module.modules())


def _compile(plan: Plan, part: tuple[Tensor, ...], measure: bool) -> Callable[..., object] | None:
    """Let oneDNN Graph run the plan, with `measure` only where that is faster; None where it does not."""
    module = plan.module
    compiled = None if _is_watched(module) else compile_plan(module, part)
    if compiled is None:
        return None
    if measure:
        latency_ms = least_ms({"plan": lambda: module(*part), "compiled": lambda: compiled(*part)})
        if not clearly_faster("compiled", "plan", latency_ms):
            return None
    # Its bound method, which calls no hooks and is no submodule.
    return getattr(compiled, "forward", compiled)


def _compare(
    execution: Execution,
    plan: Plan,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    ours: Callable[..., object],
) -> Execution:
    """`execution`, with our latency beside the model's, and the model itself where that is faster."""
    runs: dict[str, Callable[[], object]] = {ACCELERATED: lambda: ours(*inputs)}
    for name in EAGER:
        if name == "eager channels_last" and not any(isinstance(m, nn.Conv2d) for m in model.modules()):
            continue
        same = name == "eager" and _dtype_of(model) == plan.dtype
        try:
            candidate = model if same else _own(model, name, plan.dtype)
        except (RuntimeError, TypeError) as error:
            logger.warning("%s cannot be copied, and is not compared with: %s", type(model).__name__, error)
            continue
        runs[name] = functools.partial(candidate, *inputs)
    device = plan.device
    judged = judge(execution, time_interleaved(runs, _ROUNDS, _ROUND_MS, warmup=1, device=device))
    if judged.ratios and 1 / _CLOSE < min(judged.ratios.values()) < _CLOSE:
        return judge(execution, time_interleaved(runs, _ROUNDS_IF_CLOSE, _ROUND_MS, warmup=1, device=device))
    return judged


def judge(execution: Execution, timings: dict[str, Timing]) -> Execution:
    """`execution`, or the model itself where that took less time; `timings` by name, ours as ACCELERATED."""
    latency_ms = {name: timing.median_ms for name, timing in timings.items()}
    ratios = {
        name: timings[ACCELERATED].speedup_over(timings[name]) for name in timings if name != ACCELERATED
    }
    if not ratios:
        return execution
    best = min(ratios, key=ratios.__getitem__)
    eager = best if ratios[best] < 1.0 else None
    return replace(execution, eager=eager, latency_ms=latency_ms, ratios=ratios)


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


def _own(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    own: Any = copy.deepcopy(model).to(dtype).requires_grad_(False)
    return own.to(memory_format=torch.channels_last) if name == "eager channels_last" else own


def fingerprint(module: nn.Module) -> str:
    """Equal for plans of equal structure, shapes and dtype, whatever their weights."""
    parts: list[Any] = []
    for name, inner in module.named_modules():
        if isinstance(inner, FusedModule):
            parts.append([name, inner.signature()])
        elif isinstance(inner, fx.GraphModule):
            parts.append([name, str(inner.graph)])
        else:
            parts.append([name, type(inner).__name__, inner.extra_repr()])
    parts += [[name, list(t.shape), str(t.dtype)] for name, t in module.state_dict().items()]
    parts.sort(key=json.dumps)  # not by when they were registered
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def worth_measuring(plan: Plan, inputs: tuple[Tensor, ...]) -> bool:
    """Whether measuring means anything: not for empty batches, nor in Triton's interpreter."""
    fused = plan.fused_modules().values()
    interpreted = plan.device.type == "cpu" and any(m.implementation() == "triton" for m in fused)
    return all(x.numel() > 0 for x in inputs) and not interpreted
