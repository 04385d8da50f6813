"""Choose by measurement: each fused module's implementation on its own shape, and how many images run at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from depthfuse.nn import FusedConv2d, FusedLinear

logger = logging.getLogger(__name__)

# Below this gain over the usual best the difference is measurement noise.
_LEAST_GAIN = 1.03
_ROUNDS = 5
_CALLS_MS = 0.5  # time for each candidate in each round


def choose_implementations(plan: nn.Module, inputs: tuple[Tensor, ...], measure: bool) -> None:
    """Bind an implementation to each fused module of `plan`, for the shapes it sees when the plan is given `inputs`.

    With `measure` the candidates of each distinct shape run in turn on random data and the fastest is taken; without,
    the usual best.
    """
    winners: dict[tuple, str] = {}
    for module, shapes in _shapes_seen(plan, inputs).items():
        candidates = module.candidates()
        key = (*_signature(module), *shapes)
        if key not in winners:
            several = measure and len(candidates) > 1
            winners[key] = _fastest(module, shapes, candidates) if several else candidates[0]
        module.use(winners[key], shapes[0])


def _shapes_seen(plan: nn.Module, inputs: tuple[Tensor, ...]) -> dict[nn.Module, list[torch.Size]]:
    """The shapes of x, and of the residual if there is one, at the first call of each fused module."""
    seen: dict[nn.Module, list[torch.Size]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(module, [x.shape for x in args if x is not None])

    fused = [m for m in plan.modules() if isinstance(m, FusedConv2d | FusedLinear)]
    handles = [module.register_forward_pre_hook(record) for module in fused]
    try:
        with torch.no_grad():
            plan(*(x.clone() for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _signature(module: nn.Module) -> tuple:
    geometry = ()
    if isinstance(module, FusedConv2d):
        geometry = (*module.stride, *module.padding, *module.dilation, module.groups)
    affine = module.scale is not None or module.shift is not None
    return type(module), tuple(module.weight.shape), geometry, module.act, affine


def _fastest(module: nn.Module, shapes: list[torch.Size], candidates: list[str]) -> str:
    inputs = [torch.randn(shape).to(module.weight.dtype) for shape in shapes]
    if isinstance(module, FusedConv2d):
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]

    def bound(name: str) -> Callable[[], object]:
        module.use(name, shapes[0])
        runner = module._runner or module
        arguments = inputs if len(inputs) > 1 else [inputs[0], None]
        return lambda: runner(*arguments)

    with torch.no_grad():
        latency_ms = measure_ms({name: bound(name) for name in candidates})
    usual, best = candidates[0], min(latency_ms, key=latency_ms.__getitem__)
    logger.debug("%r: %s", module, {name: round(value, 4) for name, value in latency_ms.items()})
    return best if clearly_faster(best, usual, latency_ms) else usual


def choose_chunk(plan: nn.Module, inputs: tuple[Tensor, ...]) -> int | None:
    """How many images to run at a time, or None for all that there are.

    What a few images need fits into the cache, and needs no fresh memory from the operating system at every layer.
    Powers of two below the batch size of `inputs` are tried.
    """
    batch = inputs[0].shape[0] if inputs[0].dim() else 0
    sizes = [size for size in (1, 2, 4, 8, 16) if size < batch]
    if not sizes or any(x.dim() == 0 or x.shape[0] != batch for x in inputs):
        return None
    with torch.no_grad():
        whole = plan(*inputs)
        if not isinstance(whole, Tensor) or whole.dim() == 0 or whole.shape[0] != batch:
            return None
        # Does each image's output depend on that image alone? Rounding differs with the shape of a product.
        halves = run_in_chunks(plan, inputs, max(sizes))
        if halves.shape != whole.shape or not torch.allclose(
            halves, whole, rtol=1e-2, atol=1e-2 * whole.abs().max()
        ):
            return None
        runs = {size: lambda size=size: run_in_chunks(plan, inputs, size) for size in sizes}
        latency_ms = measure_ms({batch: lambda: plan(*inputs), **runs}, rounds=3)
    best = min(latency_ms, key=latency_ms.__getitem__)
    return best if best != batch and clearly_faster(best, batch, latency_ms) else None


def run_in_chunks(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], size: int) -> Tensor:
    """Run `size` images at a time, and the rest of the batch after them."""
    parts = zip(*(x.split(size) for x in inputs), strict=True)
    return torch.cat([run(*part) for part in parts])


def clearly_faster(name: Hashable, usual: Hashable, latency_ms: dict) -> bool:
    """Whether `name` beats `usual` by more than measurement noise."""
    return latency_ms[name] * _LEAST_GAIN < latency_ms[usual]


def measure_ms(runs: dict, rounds: int = _ROUNDS) -> dict:
    """The least time in ms of each of `runs`, a {name: callable of nothing}, taken in turns: {name: ms}.

    The least, because whatever disturbs a run makes it longer.
    """

    def once(run: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls * 1e3

    calls, least_ms = {}, {}
    for name, run in runs.items():
        once(run, 1)
        calls[name] = max(1, min(20, round(_CALLS_MS / max(once(run, 1), 1e-3))))
        least_ms[name] = float("inf")
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            least_ms[name] = min(least_ms[name], once(run, calls[name]))
    return least_ms
