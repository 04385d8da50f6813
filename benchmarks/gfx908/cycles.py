"""A model of the time that a compute unit of the MI100 takes for workgroups, from what they execute. *Simulated*.

Waves issue in order, at most one instruction in four clocks each. A SIMD has a vector and a matrix unit and a port for
scalar instructions; LDS and the first cache serve all four SIMDs, one access after the other. Loads take the latency of
the nearest memory that holds their lines; the caches are filled as they go. Where several waves could issue, the one
that has waited longest does. New workgroups start as soon as one ends.

No parameter is fitted to a measurement of ours, for there is none. Beside published figures (`validation.py`) it is
mostly within a fifth; less is to be expected between two versions of a kernel.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.gfx908.busy import SIMDS
from benchmarks.gfx908.trace import Event
from benchmarks.gfx908.waves import COUNTERS

_ISSUE = 4  # clocks between two instructions of a wave (MI100 ISA guide: 64 lanes on 16)


@dataclass(frozen=True)
class Parameters:
    """The hardware. Latencies of LDS and of scalar loads are those that gem5's model of Vega was fitted with to a card
    ("GAP", the GPU accuracy profiler: vrf_lm_bus_latency 63, scalar-mem-req-latency 28 and mem-resp-latency 69); the
    compute unit of the MI100 is its successor. Those of loads were measured on an MI210, the MI100's successor, at
    1.7 GHz (gpu-benches, gpu-latency/mi210.txt): 125, 242 and 574 clocks.

    Attributes:
        lds_latency: clocks from LDS's answer to the register.
        cache_latency, second_latency, memory_latency: of a load, where its lines are in the first cache, in the second,
            or in memory. What memory takes longer than the second, 195 ns, is the same at any clock of ours.
        constant_latency: of a scalar load.
        cache_lines: of the first cache: 16 KiB of 64 bytes (AMD CDNA architecture white paper).
        backlog_bytes: of a compute unit's stores that the second cache holds until memory has time for them, loads
            going first: its share of half of 8 MiB (white paper; the half is an assumption).
        second_bytes: a clock and compute unit from the second cache, where all of them load: 2,726 GB/s were measured
            (gpu-benches, gpu-l2-cache/mi100.txt; rocm-amdgpu-bench#4: 2,530), at 1.502 GHz 56.7 bytes a clock and
            slice. The white paper promises 128.
        line_bytes: a clock from the second cache to one compute unit that is alone: the width of the first's port.
        memory_bytes: a clock and compute unit from HBM: 1,229 GB/s by 120 units at 1.502 GHz, of which copies reach
            1,041 to 1,043 (rocm-amdgpu-bench#4; gpu-benches, gpu-stream/mi100.txt).
    """

    lds_latency: int = 63
    cache_latency: int = 125
    second_latency: int = 242
    memory_latency: int = 535
    constant_latency: int = 97
    cache_lines: int = 256
    backlog_bytes: int = 2**22 // 120
    second_bytes: float = 2726e9 / 120 / 1.502e9
    line_bytes: float = 64.0
    memory_bytes: float = 1043e9 / 120 / 1.502e9

    def shared_by(self, units: int) -> Parameters:
        """The same, where so many of the 120 compute units are at work: each has more of what all share."""
        second = min(self.line_bytes, self.second_bytes * 120 / units)
        return replace(self, second_bytes=second, memory_bytes=min(second, self.memory_bytes * 120 / units))


@dataclass
class _Wave:
    events: Sequence[Event]
    workgroup: int
    simd: int
    at: int = 0
    # When each access under way is done: of memory in order, of LDS and scalar loads.
    memory: deque = field(default_factory=deque)
    local: deque = field(default_factory=deque)


def _room(pending: deque, most: int) -> float:
    """When a counter has room for one access more."""
    return pending[len(pending) - most] if len(pending) >= most else 0.0


class ComputeUnit:
    """One compute unit, with the state of its units and of its first cache.

    Args:
        fresh: the share of lines that nobody has loaded before which come from memory; the others are in the second
            cache, because another compute unit has loaded them.
    """

    def __init__(self, parameters: Parameters, fresh: float):
        self.parameters, self.fresh = parameters, fresh
        self.free = {(unit, simd): 0 for unit in ("vector", "matrix", "scalar") for simd in range(SIMDS)}
        self.free |= {("lds", 0): 0, ("memory", 0): 0}
        self.second_free = self.memory_free = 0.0
        self.backlog = 0.0  # clocks that memory needs for stores that it has put off
        self.held: OrderedDict[int, None] = OrderedDict()
        self.seen: set[int] = set()
        self.owed = 0.0  # lines that are to come from memory
        self.busy = dict.fromkeys(("vector", "matrix", "scalar", "lds", "memory"), 0)
        self.end = 0.0

    def run(self, workgroups: Sequence[Sequence[Sequence[Event]]], resident: int) -> list[float]:
        """When each of these workgroups (each a list of its waves' events) has ended, in clocks, in order of ending.

        Args:
            resident: how many are there at once.
        """
        waiting, ended, queue, ticket = deque(enumerate(workgroups)), [], [], 0
        left: dict[int, int] = {}
        met: dict[int, list[tuple[float, _Wave]]] = {}
        placed = 0

        def enter(time: float) -> None:
            nonlocal ticket, placed
            number, waves = waiting.popleft()
            left[number], met[number] = len(waves), []
            for events in waves:
                heapq.heappush(queue, (time, ticket, _Wave(events, number, placed % SIMDS)))
                ticket, placed = ticket + 1, placed + 1

        while waiting and len(left) < resident:
            enter(0.0)
        while queue:
            time, order, wave = heapq.heappop(queue)
            if wave.at == len(wave.events):
                left[wave.workgroup] -= 1
                if not left[wave.workgroup]:
                    del left[wave.workgroup]
                    ended.append(time)
                    if waiting:
                        enter(time)
                continue
            event = wave.events[wave.at]
            if event.unit == "barrier":
                wave.at += 1
                here = met[wave.workgroup]
                here.append((time, wave))
                if len(here) == left[wave.workgroup]:
                    met[wave.workgroup] = []
                    latest = max(arrived for arrived, _ in here) + _ISSUE
                    for _, other in here:
                        heapq.heappush(queue, (latest, ticket, other))
                        ticket += 1
                continue
            start = max(time, self._ready(event, wave))
            if start > time:
                heapq.heappush(queue, (start, order, wave))  # others may issue before
                continue
            wave.at += 1
            heapq.heappush(queue, (self._issue(event, wave, time), ticket, wave))
            ticket += 1
        self.end = ended[-1]
        return ended

    def shares(self) -> dict[str, float]:
        """The share of the time in which each unit was busy; of vector and matrix units, of all four SIMDs."""
        names = {"vector": "vector", "matrix": "matrix", "lds": "lds", "cache": "memory"}
        counts = {"vector": SIMDS, "matrix": SIMDS}
        return {n: round(self.busy[unit] / counts.get(n, 1) / self.end, 3) for n, unit in names.items()}

    def _ready(self, event: Event, wave: _Wave) -> float:
        """When an instruction can issue, as far as its unit, or what it waits for, goes."""
        if event.unit == "matrix":
            return max(self.free["matrix", wave.simd], self.free["vector", wave.simd])
        if event.unit in ("vector", "scalar"):
            return self.free[event.unit, wave.simd]
        if event.unit == "memory":
            return _room(wave.memory, COUNTERS["vmcnt"])
        if event.unit == "lds":
            return _room(wave.local, COUNTERS["lgkmcnt"])
        if event.unit == "constant":
            return max(self.free["scalar", wave.simd], _room(wave.local, COUNTERS["lgkmcnt"]))
        if event.unit == "wait":
            due = 0.0
            for pending, most in zip((wave.memory, wave.local), event.waits, strict=True):
                if most is not None and len(pending) > most:
                    due = max(due, pending[len(pending) - most - 1])
            return due
        return 0.0

    def _issue(self, event: Event, wave: _Wave, time: float) -> float:
        """Start an instruction; when the wave's next one can be looked at."""
        parameters, unit, simd = self.parameters, event.unit, wave.simd
        if unit in self.busy:
            self.busy[unit] += event.clocks
        if unit == "matrix":
            self.free["matrix", simd], self.free["vector", simd] = time + event.clocks, time + _ISSUE
        elif unit in ("vector", "scalar"):
            self.free[unit, simd] = time + event.clocks
        elif unit == "constant":
            self.free["scalar", simd] = time + _ISSUE
            wave.local.append(time + parameters.constant_latency)
        elif unit == "lds":
            done = max(time, self.free["lds", 0]) + event.clocks
            self.free["lds", 0] = done
            wave.local.append(max(done + parameters.lds_latency, wave.local[-1] if wave.local else 0))
        elif unit == "memory":
            done = self._load(event, time)
            wave.memory.append(max(done, wave.memory[-1] if wave.memory else 0))
        elif unit == "wait":
            for pending, most in zip((wave.memory, wave.local), event.waits, strict=True):
                while most is not None and len(pending) > most:
                    pending.popleft()
        elif unit == "pause":
            return time + event.clocks
        return time + _ISSUE

    def _load(self, event: Event, time: float) -> float:
        """When an access to memory is done. A store is done when the second cache has it."""
        parameters = self.parameters
        start = max(time, self.free["memory", 0])
        self.free["memory", 0] = start + event.clocks
        latency, missed, far = parameters.cache_latency, 0, 0
        for line in event.lines:
            if event.loads and line in self.held:
                self.held.move_to_end(line)
                continue
            missed += 1
            if line not in self.seen:
                self.seen.add(line)
                self.owed += self.fresh
            if self.owed >= 1:
                self.owed -= 1
                far += 1
            if event.loads:
                self.held[line] = None
                if len(self.held) > parameters.cache_lines:
                    self.held.popitem(last=False)
        arrived = start + event.clocks
        if missed:
            latency = parameters.second_latency
            self.second_free = max(self.second_free, arrived) + missed * 64 / parameters.second_bytes
            arrived = self.second_free
        if far:
            idle = max(0.0, start - self.memory_free)
            self.backlog = max(0.0, self.backlog - idle)
            self.memory_free = max(self.memory_free, start)
            taken = far * 64 / parameters.memory_bytes
            if event.loads:
                latency = parameters.memory_latency
                self.memory_free += taken
                arrived = max(arrived, self.memory_free)
            else:
                most = parameters.backlog_bytes / parameters.memory_bytes
                self.backlog += taken
                if self.backlog > most:
                    self.memory_free += self.backlog - most
                    self.backlog, arrived = most, max(arrived, self.memory_free)
        return arrived + latency
