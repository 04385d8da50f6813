"""Choose by measurement: each fused module's implementation on its own shape, and how many images run at a time."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.planning.program import Call
from depthfuse.fused.layers import FusedConv2d, FusedModule
from depthfuse.measured_cache import MeasuredCache
from depthfuse.measuring.timing import time_interleaved

logger = logging.getLogger(__name__)

TUNE = ("off", "heuristic", "measure")

# Below this gain over the usual best the difference is measurement noise.
_LEAST_GAIN = 1.03
_ROUNDS = 5
_ROUND_MS = 0.5  # time for each candidate in each round


def choose_implementations(
    plan: Plan, call: Call, tune: str, cache: MeasuredCache | None = None, exact: bool = False
) -> None:
    """Bind an implementation to each fused module of `plan`, for the shapes it sees in `call`.

    Args:
        tune: "off" binds none; "heuristic" takes the usual best; "measure" runs the candidates of each distinct
            shape in turn on random data and takes the fastest.
        cache: where measurements are looked up and kept. exact: whether Winograd is no candidate.
    """
    if tune == "off":
        return
    winners: dict[str, str] = {}
    for module, shapes in _shapes_seen(plan, call).items():
        candidates = [name for name in module.candidates(shapes[0]) if not (exact and name == "winograd")]
        if tune != "measure" or len(candidates) == 1:
            module.use(candidates[0], shapes[0])
            continue
        question = {
            **module.signature(),
            "inputs": [list(shape) for shape in shapes],
            "candidates": candidates,
        }
        key = repr(question)
        if key not in winners:
            answer = cache.get(question) if cache else None
            if answer is None or answer.get("winner") not in candidates:
                latency_ms = _latencies(module, shapes, candidates)
                answer = {"winner": _winner(latency_ms, usual=candidates[0]), "latency_ms": latency_ms}
                if cache:
                    cache.put(question, answer)
            winners[key] = answer["winner"]
        module.use(winners[key], shapes[0])


def bind_implementations(plan: Plan, call: Call, chosen: Mapping[str, str]) -> None:
    """Bind what was chosen before: {path of a fused module in the plan: implementation}.

    Raises ValueError for an implementation that is none here, KeyError for a module without one.
    """
    names = {module: name for name, module in plan.fused_modules().items()}
    for module, shapes in _shapes_seen(plan, call).items():
        module.use(chosen[names[module]], shapes[0])


def _shapes_seen(plan: Plan, call: Call) -> dict[FusedModule, list[torch.Size]]:
    """The shapes of the tensors that each fused module is given, at its first call."""
    seen: dict[FusedModule, list[torch.Size]] = {}

    def record(module: FusedModule, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(module, [x.shape for x in args if x is not None])

    handles = [module.register_forward_pre_hook(record) for module in plan.fused_modules().values()]
    try:
        with torch.no_grad():
            call = call.on_clones()
            args, kwargs = (call.tensors, {}) if plan.outputs is not None else call.arguments()
            plan.module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _latencies(module: FusedModule, shapes: list[torch.Size], candidates: list[str]) -> dict[str, float]:
    like = next(module.buffers())
    inputs = [torch.randn(shape, device=like.device).to(like.dtype) for shape in shapes]
    if isinstance(module, FusedConv2d):
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]

    def bound(name: str) -> Callable[[], object]:
        twin = copy.copy(module)  # the same tensors, another implementation
        twin.use(name, shapes[0])
        return lambda: twin(*inputs)

    runs = {name: bound(name) for name in candidates}
    latency_ms = least_ms(runs) if like.device.type == "cpu" else _replayed_ms(runs, like.device)
    logger.debug("%r: %s", module, {name: round(value, 4) for name, value in latency_ms.items()})
    return latency_ms


def _replayed_ms(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The median time in ms of each of `runs` on a GPU, by graph replay: Python's launching, which the finished model
    does not pay for either, would hide what the kernels take.
    """
    from triton.testing import do_bench_cudagraph

    with torch.cuda.device(device):  # the timer captures and synchronises on the current one
        torch.cuda.synchronize()  # it runs on a stream of its own, which waits for nothing
        return {name: do_bench_cudagraph(run, rep=20, return_mode="median") for name, run in runs.items()}


def _winner(latency_ms: Mapping[str, float], usual: str) -> str:
    best = min(latency_ms, key=latency_ms.__getitem__)
    return best if clearly_faster(best, usual, latency_ms) else usual


def choose_chunk(plan: Plan, call: Call) -> int | None:
    """How many images to run at a time, or None for all that there are.

    What a few images need fits into the cache, and needs no fresh memory from the operating system at every layer.
    Powers of two below the batch size of `call` are tried, as far as the plan takes them.
    """
    inputs = call.tensors
    batch = inputs[0].shape[0] if inputs[0].dim() else 0
    if plan.form is None or plan.writes_inputs or any(x.dim() == 0 or x.shape[0] != batch for x in inputs):
        return None
    takes = plan.form.takes
    sizes = [
        size
        for size in (1, 2, 4, 8, 16)
        if size < batch
        and all(
            takes(replace(call, tensors=tuple(x[:n] for x in inputs))) for n in {size, batch % size or size}
        )
    ]
    if not sizes:
        return None
    with torch.no_grad():
        if not images_are_independent(plan.module, inputs, max(sizes)):
            return None
        runs = {size: lambda size=size: run_in_chunks(plan.module, inputs, size) for size in sizes}
        latency_ms = least_ms({batch: lambda: plan.module(*inputs), **runs}, rounds=3)
    best = min(latency_ms, key=latency_ms.__getitem__)
    return best if best != batch and clearly_faster(best, batch, latency_ms) else None


@torch.no_grad()
def images_are_independent(graph: nn.Module, inputs: tuple[Tensor, ...], size: int) -> bool:
    """Whether `graph` gives one tensor, an entry an image, each of which depends on that image alone.

    Args:
        inputs: a batch of more than `size` images, by which it is cut for the comparison.
    """
    whole = graph(*inputs)
    if not isinstance(whole, Tensor) or whole.dim() == 0 or whole.shape[0] != inputs[0].shape[0]:
        return False
    parts = run_in_chunks(graph, inputs, size)
    if parts.shape != whole.shape or not whole.is_floating_point():
        return False
    # Rounding differs with the shape of a product.
    return torch.allclose(parts, whole, rtol=1e-2, atol=1e-2 * whole.abs().max())


def run_in_chunks(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], size: int) -> Tensor:
    """Run `size` images at a time, and the rest of the batch after them."""
    parts = zip(*(x.split(size) for x in inputs), strict=True)
    return torch.cat([run(*part) for part in parts])


def clearly_faster(name: Hashable, usual: Hashable, latency_ms: dict) -> bool:
    """Whether `name` beats `usual` by more than measurement noise."""
    return latency_ms[name] * _LEAST_GAIN < latency_ms[usual]


def least_ms(
    runs: Mapping[Any, Callable[[], object]], rounds: int = _ROUNDS, settle_ms: float | None = 0.0
) -> dict[Any, float]:
    """The least time in ms of each of `runs` on a CPU, in turns: {name: ms}. Disturbances only add to it.

    settle_ms: as of `time_interleaved`; None for runs by different threads.
    """
    on = torch.device("cpu")
    timings = time_interleaved(runs, rounds, _ROUND_MS, warmup=1, device=on, settle_ms=settle_ms)
    return {name: timing.least_ms for name, timing in timings.items()}
