"""Timing with a cold L2: the order of its steps, told by stand-ins for the GPU, and once on a real one."""

import pytest
import torch

from benchmarks.kernels import cold


def test_copies_fit_into_a_quarter_of_the_memory():
    assert cold.copies_of(1e3, 80 * 2**30) == cold.MAX_COPIES
    assert cold.copies_of(2**30, 16 * 2**30) == 4
    assert cold.copies_of(2**40, 16 * 2**30) == 1
    assert cold.copies_of(0, 0) == 1


def test_each_replay_has_a_cold_cache_and_events_around_it_alone(monkeypatch):
    steps, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            steps.append("event")
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def __init__(self, name, ms):
            self.name, self.ms = name, ms

        def replay(self):
            steps.append(self.name)
            clock[0] += self.ms

    class Buffer:
        def zero_(self):
            steps.append("flush")
            clock[0] += 100.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: steps.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Buffer())
    captured = {
        "a": cold.Captured(Graph("a", 6.0), copies=3, outputs=[]),
        "b": cold.Captured(Graph("b", 8.0), copies=1, outputs=[]),
    }
    timings = cold.time_cold(captured, rounds=2)
    one = [["flush", "event", name, "event", "wait"] for name in "ab"]
    assert steps == (one[0] + one[1]) * 3  # a round to warm up, then two
    assert timings["a"].rounds_ms == (2.0, 2.0)
    assert timings["b"].rounds_ms == (8.0, 8.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
def test_on_a_gpu():
    sets = [torch.randn(256, 256, device="cuda") for _ in range(3)]
    captured = cold.capture([lambda x=x: x @ x for x in sets])
    assert captured.copies == 3
    timing = cold.time_cold({"product": captured}, rounds=2)["product"]
    assert len(timing.rounds_ms) == 2 and min(timing.rounds_ms) > 0
    for x, y in zip(sets, captured.outputs, strict=True):
        torch.testing.assert_close(y, x @ x)
