"""Timing by a clock of its own: rounds are interleaved, and the device that is timed is the one that is waited for."""

import itertools
import types

import pytest
import torch

from depthfuse.measuring import timing
from depthfuse.measuring.timing import Timing, quartiles, time_interleaved

CPU = torch.device("cpu")


@pytest.fixture
def events(monkeypatch):
    """What happened, in order; each look at the clock is a second later than the one before."""
    happened, ticks = [], itertools.count()

    def look():
        happened.append("clock")
        return float(next(ticks))

    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=look))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: happened.append(device))
    return happened


def test_the_device_of_what_is_timed_is_waited_for_and_no_other(events):
    second = torch.device("cuda:1")
    time_interleaved({"a": lambda: events.append("call")}, rounds=2, device=second)
    assert {event for event in events if event not in ("clock", "call")} == {second}
    for at, event in enumerate(events):
        if event == "clock":
            assert events[at - 1] == second  # all that was launched is done before the clock is read


def test_on_a_cpu_no_gpu_is_waited_for(events):
    time_interleaved({"a": lambda: events.append("call")}, rounds=2, device=CPU)
    assert set(events) == {"clock", "call"}


def test_the_device_must_be_named(events):
    with pytest.raises(TypeError, match="device"):
        time_interleaved({"a": lambda: None})


def test_rounds_are_interleaved(events):
    calls = {name: (lambda name=name: events.append(name)) for name in "ab"}
    times = time_interleaved(calls, rounds=3, warmup=1, device=CPU)
    assert {name: len(times[name].rounds_ms) for name in times} == {"a": 3, "b": 3}
    assert set(times["a"].rounds_ms) == {1000.0}  # one second between two looks, one call
    calls_alone = [event for event in events if event != "clock"]
    assert calls_alone == [
        *"aa",
        *"bb",
        *("aabb" * 3),
    ]  # warm-up and estimate; then untimed and timed in each turn


def test_a_turn_starts_with_calls_that_are_not_timed_until_others_threads_sleep(events, monkeypatch):
    def slow():
        events.append("slow")
        timing.time.perf_counter()  # takes a second

    monkeypatch.setattr(timing, "_SETTLE_MS", 3500.0)
    time_interleaved({"slow": slow, "other": lambda: None}, rounds=1, warmup=1, device=CPU)
    # One to warm up, one to count the repeats, one, two (of two seconds) until 3.5 s have passed, and the timed one.
    assert events.count("slow") == 1 + 1 + 1 + 2 + 1
    for calls, settle_ms in (({"slow": slow, "other": lambda: None}, 0.0), ({"slow": slow}, None)):
        events.clear()
        time_interleaved(calls, rounds=1, warmup=1, device=CPU, settle_ms=settle_ms)
        assert events.count("slow") == 1 + 1 + 1 + 1


def test_ratios_go_round_by_round():
    slowing, half = Timing((1.0, 2.0, 4.0)), Timing((0.5, 1.0, 2.0))
    assert half.ratios_to(slowing) == (0.5, 0.5, 0.5) and half.speedup_over(slowing) == 2.0
    assert slowing.median_ms == 2.0 and slowing.least_ms == 1.0 and slowing.quartiles_ms == (1.5, 3.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
