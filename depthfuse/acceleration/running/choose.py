"""Choose how a plan runs as a whole: op by op, a few images at a time, by an engine in one call (ours, oneDNN Graph or
another that is installed), or not at all.

The last one is the promise that the result is never slower: where the model itself was measured to be faster than its
plan, a copy of the model runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from depthfuse.acceleration.planning.own import cast_main, main_dtype, own_copy
from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.planning.trees import flatten
from depthfuse.acceleration.running.cuda_graphs import GraphCache
from depthfuse.acceleration.running.execution import EAGER, NATIVE, ONEDNN, OP_BY_OP, Execution, Executor
from depthfuse.acceleration.running.implementations import (
    bind_implementations,
    choose_chunk,
    choose_implementations,
    clearly_faster,
    images_are_independent,
    least_ms,
)
from depthfuse.acceleration.running.native_engine import DTYPES as NATIVE_DTYPES
from depthfuse.acceleration.running.native_engine import compile_plan as compile_natively
from depthfuse.acceleration.running.native_engine import exact_algorithm
from depthfuse.acceleration.running.onednn_graph import compile_plan as compile_for_onednn
from depthfuse.acceleration.running.other_engines import OTHER_ENGINES, Exported, compile_plan
from depthfuse.fused.layers import FusedModule
from depthfuse.measured_cache import MeasuredCache
from depthfuse.measuring.accuracy import TOLERANCE, relative_error
from depthfuse.measuring.timing import Timing, time_interleaved
from depthfuse.native.library import isa, why_missing
from depthfuse.untrusted import is_out_of_memory

logger = logging.getLogger(__name__)

ACCELERATED = "accelerated"
_ROUNDS, _ROUNDS_IF_CLOSE = 5, 15
_CLOSE = 1.1  # within this ratio a few rounds decide by chance
_ROUND_MS = 20.0

Finish = Callable[[Executor], Callable[..., object]]


def choose(
    plan: Plan,
    model: nn.Module | None,
    call: Call,
    tune: str,
    finish: Finish = lambda executor: executor,
    engines: Sequence[str] = (),
    exact: bool = False,
) -> Executor:
    """Choose what runs each operation of a plan, and the whole, for calls like `call`.

    Args:
        model: what the plan was made from, in evaluation mode, to be compared with; None where it is not at hand.
        call: in the plan's dtypes.
        tune: see `depthfuse.accelerate`.
        finish: makes of an executor what the caller will call in the end; that is what is compared with the model.
        engines: which of OTHER_ENGINES are candidates, too. exact: see `depthfuse.accelerate`.
    """
    if plan.writes_inputs:
        call = call.on_clones()  # every run writes over them
    plain = Execution(exact=exact)
    choose_implementations(plan, call, "heuristic" if tune == "measure" else tune, exact=exact)
    if tune == "measure" and worth_measuring(plan, call):
        return _choose_by_measurement(
            plan, model, call, MeasuredCache.of(plan.device), finish, engines, plain
        )
    graphs = None if tune == "off" else _graphs(plan, call)
    return Executor(plan, replace(plain, graphs=graphs is not None), graphs=graphs)


def restore(
    plan: Plan,
    execution: Execution,
    call: Call,
    implementations: Mapping[str, str],
    model: nn.Module | None = None,
) -> Executor:
    """What was chosen before for the same plan in the same environment.

    Args:
        implementations: of each fused module, by its path in the plan.
        model: what the plan was made from, where it is at hand; without it the plan runs where the model was chosen.

    Raises ValueError for an implementation that is none here.
    """
    bind_implementations(plan, execution.part(call), implementations)
    graphs = _graphs(plan, call) if execution.graphs else None
    eager = None
    if execution.eager is not None and model is not None:
        eager = _own(model, execution.eager, plan.dtype).__call__
    chosen = execution.eager if eager is not None else None
    plain = replace(execution, compiled=None, graphs=graphs is not None, eager=chosen)
    executor = Executor(plan, plain, eager=eager, graphs=graphs)
    if execution.compiled is None:
        return executor
    return _as_before(execution.compiled, executor, call, Exported(plan.module, call.tensors))


def _choose_by_measurement(
    plan: Plan,
    model: nn.Module | None,
    call: Call,
    cache: MeasuredCache,
    finish: Finish,
    engines: Sequence[str],
    plain: Execution,
) -> Executor:
    """By measurement, or by what was measured before."""
    on_cpu, suits = plan.device.type == "cpu", _suits_native(plan)
    engines = engines if _suits_engines(plan) and not plain.exact else ()
    question = {
        "plan": fingerprint(plan.module),
        "inputs": [[list(x.shape), str(x.dtype)] for x in call.tensors],
        "call": str(call),
        "compared": model is not None,
        "native": (why_missing() or isa()) if suits else None,
        "exact": plain.exact,
        "engines": {name: OTHER_ENGINES[name].version() for name in engines},
    }
    known = Execution.from_document(cache.get(question))
    if known is not None:
        chunk = known.chunk
    else:
        chunk = choose_chunk(plan, call) if on_cpu else None
    execution = replace(plain, chunk=chunk)
    choose_implementations(plan, execution.part(call), "measure", cache, plain.exact)
    graphs = _graphs(plan, call)
    executor = Executor(plan, replace(execution, graphs=graphs is not None), graphs=graphs)
    exported = Exported(plan.module, call.tensors)
    if known is None:
        if on_cpu:
            executor = _fastest(executor, call, (*(NATIVE,) * suits, ONEDNN, *engines), exported)
        execution = executor.execution
        if model is not None:
            execution = _compare(execution, plan, model, call, finish(executor))
        cache.put(question, execution.document())
    else:
        if known.compiled is not None:
            executor = _as_before(known.compiled, executor, call, exported)
        failed = known.failed | executor.execution.failed
        execution = replace(known, compiled=executor.execution.compiled, failed=failed)
    eager = None
    if execution.eager is not None and model is not None:
        eager = _own(model, execution.eager, plan.dtype).__call__
    return replace(executor, execution=execution, eager=eager)


def _fastest(plain: Executor, call: Call, engines: Sequence[str], exported: Exported) -> Executor:
    """What takes least time for `call`: `plain`, or an engine; where the difference is noise, who comes first."""
    found = {name: _compiled(name, plain, call, exported) for name in engines}
    failed = {name: why for name, why in found.items() if isinstance(why, str) and name in OTHER_ENGINES}
    plain = replace(plain, execution=replace(plain.execution, failed=failed))
    candidates = {name: each for name, each in found.items() if not isinstance(each, str)}
    candidates[OP_BY_OP] = plain
    if len(candidates) == 1:
        return plain
    runs = {name: functools.partial(each, call) for name, each in candidates.items()}
    latency_ms = least_ms(runs, settle_ms=None)
    order = [name for name in (NATIVE, OP_BY_OP, *engines) if name in candidates]
    best = order[0]
    for name in order[1:]:
        if clearly_faster(name, best, latency_ms):
            best = name
    ratios = {name: latency_ms[name] / latency_ms[best] for name in latency_ms}
    return replace(
        candidates[best], execution=replace(candidates[best].execution, engines=ratios, failed=failed)
    )


def _as_before(name: str, plain: Executor, call: Call, exported: Exported) -> Executor:
    """With the engine that was chosen before; `plain` where it does not run the plan any more."""
    compiled = _compiled(name, plain, call, exported)
    if not isinstance(compiled, str):
        return compiled
    failed = {name: compiled} if name in OTHER_ENGINES else {}
    return replace(plain, execution=replace(plain.execution, failed=failed))


def _graphs(plan: Plan, call: Call) -> GraphCache | None:
    """On a GPU, and only there: the plan's launches as one graph for each input shape."""
    if plan.device.type != "cuda" or plan.form is None or plan.writes_inputs:
        return None
    pairs = tuple(torch.cat([x[:1], x[:1].flip(-1)]) for x in call.tensors if x.dim() and x.shape[0])
    batchwise = len(pairs) == len(call.tensors) and images_are_independent(plan.module, pairs, 1)
    return GraphCache(plan.module, batchwise)


def _suits_native(plan: Plan) -> bool:
    """Whether our engine may run the plan at all: elsewhere nobody should wait for it to be built."""
    on_cpu = plan.device.type == "cpu" and plan.dtype in NATIVE_DTYPES
    return on_cpu and plan.form is not None and not plan.writes_inputs


def _suits_engines(plan: Plan) -> bool:
    """Whether another engine may."""
    return _suits_native(plan) and plan.dtype is torch.float32


def _compiled(name: str, plain: Executor, call: Call, exported: Exported) -> Executor | str:
    """`plain` with a plan that an engine runs; or why it cannot, which is in the log, too, or does not agree with the
    plan: its algorithms round differently, and another project's may be wrong.
    """
    plan = plain.plan
    if plan.form is None or plan.writes_inputs:
        return "the plan is no graph, or writes over its inputs"
    run: Callable[..., Any] | str | None
    chunk, threads, part = None, None, call
    if name == ONEDNN:  # whose layout suits a few images at a time
        chunk, part = plain.execution.chunk, plain.execution.part(call)
        run = compile_for_onednn(plan.module, part.tensors)
    elif name == NATIVE:
        if not _suits_native(plan):
            return f"the plan is of {plan.dtype} on {plan.device.type}"
        run = compile_natively(plan.module, call.tensors, exact_algorithm if plain.execution.exact else None)
    elif not _suits_engines(plan):
        return "the plan is not for float32 on a CPU"
    else:
        run, threads = compile_plan(name, exported), torch.get_num_threads()
    if run is None:  # it has said why
        return "it does not take the plan"
    if isinstance(run, str):
        logger.info("%s does not run this plan: %s", name, run)
        return run
    compiled = replace(
        plain,
        execution=replace(plain.execution, chunk=chunk, compiled=name),
        compiled=run,
        compiled_for=part.shapes(),
        compiled_threads=threads,
    )
    alone = replace(plain, eager=None, execution=replace(plain.execution, eager=None))
    given, wanted = (flatten(run(call), once=True)[0] for run in (replace(compiled, eager=None), alone))
    if any(_dtype(g) != _dtype(w) for g, w in zip(given, wanted, strict=True)):
        logger.info("the outputs of %s would be of another dtype: it is not used", name)
        return "its outputs would be of another dtype"
    if any(_stride(g) != _stride(w) for g, w in zip(given, wanted, strict=True)):
        logger.info("the outputs of %s would lie otherwise in memory: it is not used", name)
        return "its outputs would lie otherwise in memory"
    pairs = zip(given, wanted, strict=True)
    error = max((relative_error(g, w) for g, w in pairs if isinstance(w, torch.Tensor)), default=0.0)
    if not error <= TOLERANCE[plan.dtype]:
        logger.warning("%s is off by %.1e of the largest value: it is not used", name, error)
        return f"it is off by {error:.1e} of the largest value"
    return compiled


def _compare(
    execution: Execution, plan: Plan, model: nn.Module, call: Call, ours: Callable[..., object]
) -> Execution:
    """`execution`, with our latency beside the model's, and the model itself where that is faster."""
    args, kwargs = call.arguments()
    runs: dict[str, Callable[[], object]] = {ACCELERATED: lambda: ours(*args, **kwargs)}
    for name in EAGER:
        if name == "eager channels_last" and not any(isinstance(m, nn.Conv2d) for m in model.modules()):
            continue
        same = name == "eager" and main_dtype(model) == plan.dtype
        candidate = model if same else _own(model, name, plan.dtype)
        if name == "eager channels_last" and not _looks_like(
            candidate, _own(model, "eager", plan.dtype), call
        ):
            continue
        runs[name] = functools.partial(candidate, *args, **kwargs)
    settle_ms = None if execution.compiled in (NATIVE, *OTHER_ENGINES) else 0.0

    def judged_by(rounds: int) -> Execution:
        timings = time_interleaved(runs, rounds, _ROUND_MS, warmup=1, device=plan.device, settle_ms=settle_ms)
        return judge(execution, timings)

    judged = judged_by(_ROUNDS)
    if judged.ratios and 1 / _CLOSE < min(judged.ratios.values()) < _CLOSE:
        return judged_by(_ROUNDS_IF_CLOSE)
    return judged


def _looks_like(candidate: nn.Module, model: nn.Module, call: Call) -> bool:
    """Whether a model still runs with its weights in another memory layout, and gives outputs that lie in memory as
    before: a `view` in it may not take them, and one of the caller's neither.
    """
    outputs: list[list[Any]] = []
    for each in (candidate, model):
        args, kwargs = call.on_clones().arguments()
        try:
            with torch.no_grad():
                outputs.append(flatten(each(*args, **kwargs), once=True)[0])
        except (RuntimeError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            logger.info("the model does not run in channels_last: %s", error)
            return False
    return all(_stride(g) == _stride(e) for g, e in zip(*outputs, strict=True))


def _dtype(x: object) -> torch.dtype | None:
    return x.dtype if isinstance(x, torch.Tensor) else None


def _stride(x: object) -> tuple[int, ...] | None:
    """Of all axes along which there is more than one."""
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        return None
    return tuple(step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1)


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


def _own(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    own: Any = cast_main(own_copy(model), dtype)
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


def worth_measuring(plan: Plan, call: Call) -> bool:
    """Whether measuring means anything: not for empty batches, nor in Triton's interpreter."""
    fused = plan.fused_modules().values()
    interpreted = plan.device.type == "cpu" and any(m.implementation() == "triton" for m in fused)
    return all(x.numel() > 0 for x in call.tensors) and not interpreted
