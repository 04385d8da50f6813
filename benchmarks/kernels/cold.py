"""GPU time of single operators with a cold L2 cache, by graph replay.

A graph holds several copies of the call, each with operands and output of its own, and before each replay a buffer much
larger than L2 is overwritten: so every copy finds its data in memory, where a network's next layer would find most of
them. One pair of events times the whole graph, so that its launch is shared among the copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from depthfuse.measuring.timing import Timing

MAX_COPIES = 16
# Beyond L2 some cards have a last-level cache that no property tells of; MI300X has 256 MiB.
FLUSH_BYTES = 2**29


def copies_of(bytes_of_one: float, free_bytes: int) -> int:
    """How many copies of a call, with its operands and output, a graph should hold in a quarter of the free memory."""
    return max(1, min(MAX_COPIES, int(free_bytes / 4 / max(bytes_of_one, 1.0))))


@dataclass(frozen=True)
class Captured:
    """A graph of several copies of one call."""

    graph: torch.cuda.CUDAGraph
    copies: int
    outputs: list[Tensor]  # alive as long as the graph, so that no two copies write to the same memory


def capture(calls: list[Callable[[], Tensor]]) -> Captured:
    """Warm the calls up (they compile and choose algorithms) and capture them into one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return Captured(graph, len(calls), outputs)


@torch.inference_mode()
def time_cold(captured: dict[str, Captured], rounds: int) -> dict[str, Timing]:
    """Milliseconds a call of each contender, in rounds in which they take turns; each with a cold L2."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rounds_ms: dict[str, list[float]] = {name: [] for name in captured}
    for round_index in range(-1, rounds):  # the first warms up
        for name, held in captured.items():
            flush.zero_()
            start.record()
            held.graph.replay()
            end.record()
            torch.cuda.synchronize()
            if round_index >= 0:
                rounds_ms[name].append(start.elapsed_time(end) / held.copies)
    return {name: Timing(tuple(values)) for name, values in rounds_ms.items()}
