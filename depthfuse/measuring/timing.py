"""Latency measured honestly: warm-up, interleaved rounds (A B A B ...), medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_SETTLE_MS = 10.0


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; a single value is all three."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass(frozen=True)
class Timing:
    """Latencies of one callable, one per round, in milliseconds."""

    rounds_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)

    @property
    def least_ms(self) -> float:
        """The fastest round: whatever disturbs a run makes it longer."""
        return min(self.rounds_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        low, _, high = quartiles(self.rounds_ms)
        return low, high

    def ratios_to(self, other: Timing) -> tuple[float, ...]:
        """self / other, round by round."""
        return tuple(s / o for s, o in zip(self.rounds_ms, other.rounds_ms, strict=True))

    def speedup_over(self, other: Timing) -> float:
        """Median over the rounds of other / self: round by round, because a machine's speed drifts."""
        return statistics.median(other.ratios_to(self))


@torch.inference_mode()
def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    min_round_ms: float = 5.0,
    warmup: int = 3,
    *,
    device: torch.device,
    settle_ms: float | None = None,
) -> dict[str, Timing]:
    """Time each call once a round, in turn, each repeated until a round lasts `min_round_ms`.

    Each turn starts with one call that is not timed: threads and caches are cold after another's turn. Nothing else may
    run on the machine.

    Args:
        device: where the calls compute. A GPU is synchronised around each round, as a call only launches its work;
            which is why there is no default: without the right one the launches alone would be timed.
        settle_ms: for how long each turn's calls go untimed. Threads of OpenMP spin for some 5 ms after their work and
            keep the cores from a call that has threads of its own, as the native engine's, which then seems to take
            up to twice its time. None: 10 on a CPU where there are several calls; 0 where all run on the same threads.
    """
    if settle_ms is None:
        settle_ms = _SETTLE_MS if device.type == "cpu" and len(calls) > 1 else 0.0

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def settle(call: Callable[[], object]) -> None:
        call()
        if not settle_ms:
            return
        start = time.perf_counter()
        while (time.perf_counter() - start) * 1e3 < settle_ms:
            call()

    def run_ms(call: Callable[[], object], repeats: int) -> float:
        sync()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        sync()
        return (time.perf_counter() - start) * 1e3 / repeats

    repeats = {}
    for name, call in calls.items():
        run_ms(call, warmup)
        once = run_ms(call, 1)
        repeats[name] = max(1, min(1000, round(min_round_ms / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            settle(call)
            times[name].append(run_ms(call, repeats[name]))
    return {name: Timing(tuple(values)) for name, values in times.items()}
