"""Run a whole plan through the native engine (csrc/cpu), for one input shape on a CPU.

A graph with an operation that the engine does not have runs as before. One of bfloat16 or float16 is computed in
float32; where the processor multiplies bfloat16, the factors of such products are rounded to it, as anywhere else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.running.implementations import least_ms
from depthfuse.acceleration.running.native_lowering import Lowering
from depthfuse.acceleration.running.native_values import Algorithms, Unsupported
from depthfuse.kernels.arguments import Window
from depthfuse.measured_cache import MeasuredCache
from depthfuse.native import plan as native
from depthfuse.native.building import Missing
from depthfuse.native.library import isa
from depthfuse.native.plan import Builder, NativePlan, Node
from depthfuse.native.values import cast, in_rows

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of plans that the engine runs
WINOGRAD = (native.WINOGRAD_2, native.WINOGRAD_4)
_WORTH_MEASURING = 2_000_000  # multiply-adds, some 50 us
# A layer's weights are in no core's cache when its turn comes. So several are measured, with together as many weights.
_UNCACHED, _MOST_LAYERS = 3_000_000, 8
# Tiles' weights are half as long again. Where so few pixels share them, a layer waits for memory, not for products.
_ENOUGH_PIXELS = 96


def compile_plan(
    graph: nn.Module, inputs: tuple[Tensor, ...], algorithms: Algorithms | None = None
) -> Callable[..., Any] | None:
    """A callable for inputs of exactly these shapes, or None, with the reason in the log, where the engine has none.

    algorithms: how each product is computed; None measures it.
    """
    try:
        return compiled(graph, inputs, algorithms)
    except (Unsupported, Missing, ValueError) as reason:
        # torch.fx adds the node and its origin, in lines of their own
        logger.info("the native engine does not run this plan: %s", str(reason).splitlines()[0])
        return None


def compiled(
    graph: nn.Module, inputs: tuple[Tensor, ...], algorithms: Algorithms | None = None
) -> Callable[..., Any]:
    """As `compile_plan`; raises Unsupported, Missing or ValueError, with the reason, where the engine has none."""
    if not isinstance(graph, fx.GraphModule):
        raise Unsupported("a plan that is no single graph")
    dtypes = {x.dtype for x in inputs}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise Unsupported(f"inputs of {', '.join(sorted(map(str, dtypes)))}")
    (dtype,) = dtypes
    rounded = dtype is torch.bfloat16
    if algorithms is None:
        algorithms = fastest_of_bfloat16 if rounded else fastest_algorithm
    lowering = Lowering(graph, algorithms, native.TILES_BF16 if rounded else native.TILES)
    shapes, single = lowering.lower(inputs)
    names = [tuple(node.names) for node in lowering.builder.nodes]
    return NativeCallable(lowering.builder.build(), shapes, single, dtype, names)


def fastest_algorithm(
    shape: Sequence[int],
    filters: int,
    numbers: Sequence[int],
    *,
    exact: bool = False,
    tiles: int = native.TILES,
) -> int:
    """Of the ways to compute a convolution without groups, the one that takes least time here, now or once before.

    A small one is computed directly: to measure it would take longer than it ever will. exact: without Winograd. tiles:
    which of the two ways to use them.
    """
    *sizes, height, width, down, right = numbers
    candidates = [native.DIRECT]
    if not exact and sizes == [3, 3, 1, 1] and height == width and (down, right) == (1, 1):
        candidates.extend(WINOGRAD)
    n, h, w, c = shape
    kernel, stride = sizes[:2], sizes[2:]
    size = Window(tuple(stride), (height, width), (down, right)).output_size((h, w), kernel)
    pixels = n * math.prod(size)
    if tiles in native.BY_TILES.get(isa(), ()) and (pixels >= _ENOUGH_PIXELS or tiles == native.TILES_BF16):
        candidates.append(tiles)
    if len(candidates) == 1 or pixels * c * filters * math.prod(kernel) < _WORTH_MEASURING:
        return native.DIRECT
    cache = MeasuredCache.of(torch.device("cpu"), sources=("csrc", "native"))
    question = {
        "convolution": [*shape, filters, *numbers],
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "algorithms": candidates,
    }
    known = cache.get(question)
    if known is None or known.get("algorithm") not in candidates:
        runs = {}
        weight = torch.randn(filters, *kernel, c) / math.sqrt(c * math.prod(kernel))
        layers = min(_MOST_LAYERS, 1 + _UNCACHED // weight.numel())
        for algorithm in candidates:
            builder = Builder()
            source, x = builder.tensor(shape, native.INPUT), builder.tensor(shape)
            y = builder.tensor((n, *size, filters), native.OUTPUT)
            builder.pad(x, max(height, width))
            builder.copy(source, x)
            for _ in range(layers):
                node = Node(native.CONV, x, y, algorithm=algorithm, numbers=numbers, weight=weight)
                builder.nodes.append(node)
            planned = builder.build()
            given, result = torch.randn(n, h, w, c), torch.empty(builder.shape(y))
            runs[algorithm] = lambda planned=planned, given=given, result=result: planned.run(
                [given], [result]
            )
        latency_ms = least_ms(runs)
        known = {"algorithm": min(latency_ms, key=latency_ms.__getitem__)}
        cache.put(question, known)
    return known["algorithm"]


def exact_algorithm(shape: Sequence[int], filters: int, numbers: Sequence[int]) -> int:
    """As `fastest_algorithm`, without Winograd, whose rounding errors are some times those of a sum."""
    return fastest_algorithm(shape, filters, numbers, exact=True)


def fastest_of_bfloat16(shape: Sequence[int], filters: int, numbers: Sequence[int]) -> int:
    """As `fastest_algorithm`, where factors are bfloat16, or may be rounded to it."""
    return fastest_algorithm(shape, filters, numbers, tiles=native.TILES_BF16)


@dataclass(frozen=True, eq=False)
class NativeCallable:
    """Runs a native plan on tensors as PyTorch sees them.

    names: for each of its nodes, the graph's operations that it computes.
    """

    plan: NativePlan
    shapes: list[tuple[int, ...]]
    single: bool
    dtype: torch.dtype  # of inputs and outputs
    names: list[tuple[str, ...]]

    def __call__(self, *inputs: Tensor) -> Any:
        outputs = self._empty()
        self.plan.run(_as_it_reads(inputs), outputs)
        outputs = [cast(y, self.dtype) for y in outputs]
        return outputs[0] if self.single else tuple(outputs)

    def profile(self, inputs: Sequence[Tensor], runs: int) -> list[tuple[tuple[str, ...], float]]:
        """For each node its names, and the least time in ms that it took in so many runs, see `NativePlan.profile`."""
        times = self.plan.profile(_as_it_reads(inputs), self._empty(), runs=runs)
        return list(zip(self.names, times, strict=True))

    def _empty(self) -> list[Tensor]:
        return [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in self.shapes]


def _as_it_reads(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [in_rows(cast(x, torch.float32)) for x in inputs]
