"""Choose each fused module's implementation, by measurement on its own shape."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch
from torch import fx, nn

from depthfuse.nn import FusedConv2d

logger = logging.getLogger(__name__)

# Below this gain over the usual best the difference is measurement noise.
_LEAST_GAIN = 1.03
_ROUNDS = 5
_CALLS_MS = 0.5  # time for each candidate in each round


def choose_implementations(
    plan: fx.GraphModule, fused: Iterable[str], dtype: torch.dtype, measure: bool
) -> None:
    """Bind an implementation to each fused module of `plan` (names in `fused`), for the shapes in its nodes.

    With `measure` the candidates of each distinct shape run in turn on random data and the fastest is taken; without,
    the usual best.
    """
    winners: dict[tuple, str] = {}
    fused = set(fused)
    for node in plan.graph.nodes:
        if node.op != "call_module" or node.target not in fused:
            continue
        module = plan.get_submodule(node.target)
        shape = node.args[0].meta["shape"]
        candidates = module.candidates()
        key = (*_signature(module), shape, len(node.args) > 1)
        if key not in winners:
            several = measure and len(candidates) > 1
            winners[key] = _fastest(module, node, candidates, dtype) if several else candidates[0]
        module.use(winners[key], shape)


def _signature(module: nn.Module) -> tuple:
    geometry = ()
    if isinstance(module, FusedConv2d):
        geometry = (*module.stride, *module.padding, *module.dilation, module.groups)
    affine = module.scale is not None or module.shift is not None
    return type(module), tuple(module.weight.shape), geometry, module.act, affine


def _fastest(module: nn.Module, node: fx.Node, candidates: list[str], dtype: torch.dtype) -> str:
    inputs = [torch.randn(node.args[0].meta["shape"], dtype=dtype)]
    if len(node.args) > 1:
        inputs.append(torch.randn(node.meta["shape"], dtype=dtype))
    if isinstance(module, FusedConv2d):
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]

    def timed(name: str) -> Callable[[], None]:
        module.use(name, inputs[0].shape)
        runner = module._runner
        return (
            (lambda: module(*inputs))
            if runner is None
            else (lambda: runner(inputs[0], *(inputs[1:] or [None])))
        )

    with torch.no_grad():
        latency_ms = measure_ms({name: timed(name) for name in candidates})
    usual, best = candidates[0], min(latency_ms, key=latency_ms.__getitem__)
    logger.debug("%s: %s", node.target, {name: round(value, 4) for name, value in latency_ms.items()})
    return best if clearly_faster(best, usual, latency_ms) else usual


def clearly_faster(name: str, usual: str, latency_ms: dict[str, float]) -> bool:
    """Whether `name` beats `usual` by more than measurement noise."""
    return latency_ms[name] * _LEAST_GAIN < latency_ms[usual]


def measure_ms(runs: dict[str, Callable[[], object]], rounds: int = _ROUNDS) -> dict[str, float]:
    """The least time of each in ms, taken in turns. The least, because whatever disturbs a run makes it longer."""

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
