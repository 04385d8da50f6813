"""The state of waves that execute the same instruction at the same time.

All waves of a workgroup, and those of several workgroups, go through a kernel side by side as long as they branch
alike: an instruction is then one numpy operation over [waves, 64 lanes]. Where they part, the machine splits them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.gfx908.assembly import EXEC, SCALAR, SCALARS, VCC
from benchmarks.gfx908.faults import Fault

LANES = 64


def lanes_of(bits: np.ndarray) -> np.ndarray:
    """uint64 [waves] -> bool [waves, 64]: bit i is lane i."""
    octets = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(bool)


def bits_of(lanes: np.ndarray) -> np.ndarray:
    """bool [waves, 64] -> uint64 [waves]."""
    return np.packbits(lanes, axis=1, bitorder="little").view(np.uint64)[:, 0]


COUNTERS = {"vmcnt": 63, "lgkmcnt": 15, "expcnt": 7}  # the most that each can count


@dataclass(frozen=True, eq=False)
class Flight:
    """An access under way, which a counter of `s_waitcnt` covers.

    Attributes:
        counter: "vmcnt" or "lgkmcnt".
        ordered: whether it returns in the order of its kind; scalar loads do not.
        registers: numbers of those that it will write.
        text: the instruction.
        units: what an access to LDS touches (see lds.py), or a store writes (see memory.py), [waves, n]; else None.
        writes: whether it writes those.
    """

    counter: str
    ordered: bool
    registers: frozenset[int]
    text: str
    units: np.ndarray | None = None
    writes: bool = False


class Waves:
    """Registers of `n` waves.

    Attributes:
        machine: what they run on, with its `memory` and `lds`.
        v, a: vector registers and accumulators, uint32 [registers, n, 64].
        s: scalar registers, uint32 [n, 128], VCC and EXEC among them.
        scc: bool [n].
        lanes: EXEC as bool [n, 64]; `full` where it is all ones.
        workgroup: which of the machine's workgroups each wave belongs to; `wave`: which of its waves it is; `ids`: its
            number over the whole launch.
        flights: accesses under way, oldest first.
        pending: register number -> the access that will write it.
        undefined: register number -> lanes [n, 64] that are defined, or None where none is. What is not in it, is.
        watched: the numbers in `pending` and `undefined`: only instructions that touch these need a closer look.
    """

    def __init__(
        self, machine: Any, vectors: int, accumulators: int, workgroup: np.ndarray, wave: np.ndarray
    ):
        self.machine, self.n = machine, len(wave)
        self.v = np.zeros((vectors, self.n, LANES), np.uint32)
        self.a = np.zeros((accumulators, self.n, LANES), np.uint32)
        self.s = np.zeros((self.n, SCALARS), np.uint32)
        self.scc = np.zeros(self.n, bool)
        self.workgroup, self.wave, self.ids = workgroup, wave, wave
        self.flights: list[Flight] = []
        self.pending: dict[int, Flight] = {}
        everything = [*range(vectors), *range(256, 256 + accumulators), *range(SCALAR, SCALAR + SCALARS)]
        self.undefined: dict[int, np.ndarray | None] = dict.fromkeys(everything)
        self.watched = set(everything)
        self._views()
        self.set_exec(np.full(self.n, ~np.uint64(0)))
        self.define(SCALAR + EXEC, 2)

    def _views(self) -> None:
        self.vf, self.s64, self.sf = self.v.view(np.float32), self.s.view(np.uint64), self.s.view(np.float32)
        self.everyone = np.ones((self.n, LANES), bool)

    def define(self, first: int, count: int = 1) -> None:
        """These registers hold values from now on."""
        for number in range(first, first + count):
            self.undefined.pop(number, None)
            self.watched.discard(number)

    @property
    def exec(self) -> np.ndarray:
        return self.s64[:, EXEC // 2]

    @property
    def vcc(self) -> np.ndarray:
        return self.s64[:, VCC // 2]

    def set_exec(self, bits: np.ndarray) -> None:
        self.s64[:, EXEC // 2] = bits
        self.lanes = lanes_of(self.exec)
        self.full = bool(self.lanes.all())

    def put(self, register: int, value: np.ndarray) -> None:
        """Write a vector register in the active lanes."""
        if self.full:
            self.v[register] = value
        else:
            np.copyto(self.v[register], value, where=self.lanes)

    def put_float(self, register: int, value: np.ndarray) -> None:
        if self.full:
            self.vf[register] = value
        else:
            np.copyto(self.vf[register], value, where=self.lanes)

    def fly(self, flight: Flight) -> None:
        """An access has been issued."""
        self.flights.append(flight)
        for number in flight.registers:
            self.pending[number] = flight
            self.watched.add(number)

    def wait(self, counter: str, most: int) -> None:
        """s_waitcnt: go on when at most `most` accesses of the counter are under way.

        Those of one kind return in order, so that the newest `most` are left. Scalar loads (not `ordered`) overtake
        each other and those of LDS, and while one is under way a count above zero says nothing (MI100 ISA guide, "Data
        Dependency Resolution").
        """
        mine = [flight for flight in self.flights if flight.counter == counter]
        if most and not all(flight.ordered for flight in mine):
            return
        for flight in mine[: max(0, len(mine) - most)]:
            self.flights.remove(flight)
            if counter == "vmcnt" and flight.writes:
                self.machine.memory.land(flight.units)
            for number in flight.registers:
                if self.pending.get(number) is flight:
                    del self.pending[number]
                    if number not in self.undefined:
                        self.watched.discard(number)

    def take(self, which: np.ndarray) -> Waves:
        """A copy of some of the waves, by index."""
        part = object.__new__(Waves)
        part.machine, part.n = self.machine, len(which)
        part.v, part.a = np.take(self.v, which, axis=1), np.take(self.a, which, axis=1)
        part.s, part.scc = self.s[which], self.scc[which]
        part.workgroup, part.wave, part.ids = self.workgroup[which], self.wave[which], self.ids[which]
        part.undefined = {k: None if v is None else v[which] for k, v in self.undefined.items()}
        part._views()
        part.set_exec(self.exec[which])
        part._fly_again(self.flights, [None if f.units is None else f.units[which] for f in self.flights])
        return part

    def _fly_again(self, flights: list[Flight], units: list[np.ndarray | None]) -> None:
        self.flights, self.pending, self.watched = [], {}, set(self.undefined)
        for flight, own in zip(flights, units, strict=True):
            self.fly(replace(flight, units=own))

    def joins(self, other: Waves) -> bool:
        """Whether both have the same accesses under way, and could go on as one."""
        return [f.text for f in self.flights] == [f.text for f in other.flights]

    def join(self, other: Waves) -> Waves:
        """Both as one."""
        both = object.__new__(Waves)
        both.machine, both.n = self.machine, self.n + other.n
        both.v, both.a = np.concatenate((self.v, other.v), 1), np.concatenate((self.a, other.a), 1)
        both.s, both.scc = np.concatenate((self.s, other.s)), np.concatenate((self.scc, other.scc))
        both.workgroup = np.concatenate((self.workgroup, other.workgroup))
        both.wave, both.ids = np.concatenate((self.wave, other.wave)), np.concatenate((self.ids, other.ids))
        both.undefined = {}
        for number in self.undefined.keys() | other.undefined.keys():
            parts = [~w.undefined_lanes(number) for w in (self, other)]
            known = number < SCALAR and any(part.any() for part in parts)
            both.undefined[number] = np.concatenate(parts) if known else None
        both._views()
        both.set_exec(np.concatenate((self.exec, other.exec)))
        pairs = zip(self.flights, other.flights, strict=True)
        both._fly_again(
            self.flights, [None if a.units is None else np.concatenate((a.units, b.units)) for a, b in pairs]
        )
        return both

    def undefined_lanes(self, number: int) -> np.ndarray:
        """Lanes [n, 64] of a register that hold nothing; of a scalar register all or none."""
        if number not in self.undefined:
            return ~self.everyone
        defined = self.undefined[number]
        return self.everyone if defined is None else ~defined

    def written(self, number: int, lanes: np.ndarray, bad: np.ndarray | None) -> None:
        """A register was written in `lanes` [n, 64], of which those of `bad` hold nothing of worth."""
        unknown = self.undefined_lanes(number) & ~lanes
        if number >= SCALAR:
            unknown = ~self.everyone
        if bad is not None:
            unknown = unknown | (bad & lanes if number < SCALAR else self.everyone)
        if unknown.any():
            self.undefined[number] = ~unknown if number < SCALAR else None
            self.watched.add(number)
        else:
            self.define(number)
            if number in self.pending:
                self.watched.add(number)

    def fault(self, kind: str, detail: str, bad: np.ndarray | None = None) -> Fault:
        """A fault, with the first wave and lane of `bad` [n, 64] that has it."""
        if bad is not None and bad.any():
            wave, lane = np.argwhere(bad)[0]
            detail += f" (workgroup {self.workgroup[wave]}, wave {self.wave[wave]}, lane {lane})"
        return Fault(kind, detail)
