"""How a plan runs as a whole: op by op, through oneDNN Graph, a few images at a time, or not at all.

The last one is the promise that the result is never slower: where the model itself was measured to be faster than its
plan, a copy of the model runs.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning.parts import cast
from depthfuse.acceleration.running.execution import EAGER, Execution
from depthfuse.acceleration.running.implementations import (
    bind_implementations,
    choose_chunk,
    choose_implementations,
    clearly_faster,
    images_are_independent,
    least_ms,
)
from depthfuse.acceleration.running.model import AcceleratedModel
from depthfuse.acceleration.running.onednn_graph import compile_plan
from depthfuse.fused.layers import FusedModule
from depthfuse.measuring.measured_cache import MeasuredCache
from depthfuse.measuring.timing import Timing, time_interleaved
from depthfuse.merging.tracing import has_hooks

logger = logging.getLogger(__name__)

OURS = "accelerated"
_ROUNDS, _ROUNDS_IF_CLOSE = 5, 15
_CLOSE = 1.1  # within this ratio a few rounds decide by chance
_ROUND_MS = 20.0


def tune_plan(
    accelerated: AcceleratedModel, model: nn.Module | None, inputs: tuple[Tensor, ...], tune: str
) -> None:
    """Choose what runs each operation and the whole, for inputs like `inputs`, and write it into the report.

    Args:
        model: what the plan was made from, to be compared with; None where it is not at hand.
    """
    given = cast(inputs, accelerated)
    choose_implementations(accelerated.plan, given, "heuristic" if tune == "measure" else tune)
    execution = Execution()
    if tune == "measure" and worth_measuring(accelerated, given):
        execution = choose_execution(accelerated, model, given, MeasuredCache(accelerated.device))
    elif tune != "off":
        execution = Execution(graphs=use_graphs(accelerated, given))
    _report(accelerated, execution, given)


def apply_execution(
    accelerated: AcceleratedModel,
    execution: Execution,
    inputs: tuple[Tensor, ...],
    implementations: dict[str, str],
) -> None:
    """Set `accelerated` up for choices made before, for the same plan in the same environment.

    Args:
        implementations: of each fused module, by its path in the plan.
    """
    accelerated.chunk = execution.chunk
    part = inputs if execution.chunk is None else tuple(x[: execution.chunk] for x in inputs)
    bind_implementations(accelerated.plan, part, implementations)
    if execution.compiled:
        _compile(accelerated, part, measure=False)
    if execution.graphs:
        use_graphs(accelerated, inputs)
    _report(accelerated, replace(execution, eager=None), inputs)


def _report(accelerated: AcceleratedModel, execution: Execution, inputs: tuple[Tensor, ...]) -> None:
    report = accelerated.report()
    modules = dict(accelerated.plan.named_modules())
    entries = tuple(
        replace(entry, implementation=modules[entry.module].implementation()) if entry.fused else entry
        for entry in report.entries
    )
    executor = execution.in_words(inputs)
    accelerated.execution = execution
    accelerated.set_report(
        replace(
            report,
            entries=entries,
            executor=executor,
            latency_ms=execution.latency_ms,
            ratios=execution.ratios,
        )
    )


def choose_execution(
    accelerated: AcceleratedModel,
    model: nn.Module | None,
    inputs: tuple[Tensor, ...],
    cache: MeasuredCache | None,
) -> Execution:
    """Choose by measurement, or by what was measured before, and set `accelerated` up for it.

    Args:
        model: what the plan was made from, in evaluation mode, to be compared with at the end; None to leave that out.
        inputs: in the plan's dtype.
    """
    plan = accelerated.plan
    question = {
        "plan": fingerprint(plan),
        "inputs": [[list(x.shape), str(x.dtype)] for x in inputs],
        "compared": model is not None,
    }
    known = Execution.from_document(cache.get(question)) if cache else None
    on_cpu = accelerated.device.type == "cpu"
    if known is not None:
        chunk = known.chunk
    else:
        chunk = choose_chunk(plan, inputs) if on_cpu else None
    part = inputs if chunk is None else tuple(x[:chunk] for x in inputs)
    choose_implementations(plan, part, "measure", cache)
    accelerated.chunk = chunk
    graphs = use_graphs(accelerated, inputs)
    compiled = False
    if on_cpu and (known is None or known.compiled):
        compiled = _compile(accelerated, part, measure=known is None)
    if known is not None:
        execution = known
    else:
        execution = Execution(chunk, compiled, graphs=graphs)
        if model is not None:
            execution = _compare(execution, accelerated, model, inputs)
        if cache:
            cache.put(question, execution.document())
    if execution.eager is not None and model is not None:
        accelerated.set_eager(_own(model, execution.eager, accelerated.dtype))
    return execution


def use_graphs(accelerated: AcceleratedModel, inputs: tuple[Tensor, ...]) -> bool:
    """On a GPU, and only there: replay the plan as graphs. Says whether it does."""
    if accelerated.device.type != "cuda" or _is_watched(accelerated.plan):
        return False
    pairs = tuple(torch.cat([x[:1], x[:1].flip(-1)]) for x in inputs if x.dim() and x.shape[0])
    batchwise = len(pairs) == len(inputs) and images_are_independent(accelerated.plan, pairs, 1)
    accelerated.use_graphs(batchwise)
    return True


def _is_watched(plan: nn.Module) -> bool:
    """Whether hooks must run at every call, which a compiled copy or a replay would not do."""
    return any(has_hooks(module) for module in plan.modules())


def _compile(accelerated: AcceleratedModel, part: tuple[Tensor, ...], measure: bool) -> bool:
    """Let oneDNN Graph run the plan, with `measure` only where that is faster. Says whether it does."""
    plan = accelerated.plan
    compiled = None if _is_watched(plan) else compile_plan(plan, part)
    if compiled is None:
        return False
    if measure:
        latency_ms = least_ms({"plan": lambda: plan(*part), "compiled": lambda: compiled(*part)})
        if not clearly_faster("compiled", "plan", latency_ms):
            return False
    accelerated.set_compiled(compiled, part)
    return True


def _compare(
    execution: Execution, accelerated: AcceleratedModel, model: nn.Module, inputs: tuple[Tensor, ...]
) -> Execution:
    """`execution`, with the plan's latency beside the model's, and the model itself where that is faster."""
    runs: dict[str, Callable[[], object]] = {OURS: lambda: accelerated(*inputs)}
    for name in EAGER:
        if name == "eager channels_last" and not any(isinstance(m, nn.Conv2d) for m in model.modules()):
            continue
        same = name == "eager" and _dtype_of(model) == accelerated.dtype
        try:
            candidate = model if same else _own(model, name, accelerated.dtype)
        except (RuntimeError, TypeError) as error:
            logger.warning("%s cannot be copied, and is not compared with: %s", type(model).__name__, error)
            continue
        runs[name] = functools.partial(candidate, *inputs)
    device = accelerated.device
    judged = judge(execution, time_interleaved(runs, _ROUNDS, _ROUND_MS, warmup=1, device=device))
    if judged.ratios and 1 / _CLOSE < min(judged.ratios.values()) < _CLOSE:
        return judge(execution, time_interleaved(runs, _ROUNDS_IF_CLOSE, _ROUND_MS, warmup=1, device=device))
    return judged


def judge(execution: Execution, timings: dict[str, Timing]) -> Execution:
    """`execution`, or the model itself where that took less time; `timings` by the names of OURS and of the layouts."""
    latency_ms = {name: timing.median_ms for name, timing in timings.items()}
    ratios = {name: timings[OURS].speedup_over(timings[name]) for name in timings if name != OURS}
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


def fingerprint(plan: nn.Module) -> str:
    """Equal for plans of equal structure, shapes and dtype, whatever their weights."""
    parts: list[Any] = []
    for name, module in plan.named_modules():
        if isinstance(module, FusedModule):
            parts.append([name, module.signature()])
        elif isinstance(module, fx.GraphModule):
            parts.append([name, str(module.graph)])
        else:
            parts.append([name, type(module).__name__, module.extra_repr()])
    parts += [[name, list(t.shape), str(t.dtype)] for name, t in plan.state_dict().items()]
    parts.sort(key=json.dumps)  # not by when they were registered
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def worth_measuring(accelerated: AcceleratedModel, inputs: tuple[Tensor, ...]) -> bool:
    """Whether measuring means anything: not for empty batches, nor in Triton's interpreter."""
    fused = (m for m in accelerated.plan.modules() if isinstance(m, FusedModule))
    interpreted = accelerated.device.type == "cpu" and any(m.implementation() == "triton" for m in fused)
    return all(x.numel() > 0 for x in inputs) and not interpreted
