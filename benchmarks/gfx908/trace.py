"""What the waves of some workgroups do, one event after the other: the input of `cycles.py`."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from benchmarks.gfx908.assembly import Instruction
from benchmarks.gfx908.busy import lds_clocks, lines_of
from benchmarks.gfx908.operations import Operation
from benchmarks.gfx908.waves import Waves
from benchmarks.kernels.amd_code import matrix_clocks, vector_clocks


class Event(NamedTuple):
    """One instruction of one wave.

    Attributes:
        unit: "vector", "matrix", "scalar", "lds", "memory", "constant" (a scalar load), "wait", "barrier" or "pause".
        clocks: that the unit is busy with it.
        lines: cache lines that an access to memory touches.
        loads: whether an access to memory is a load.
        waits: (vmcnt, lgkmcnt) of a wait; None where it does not wait for that one.
    """

    unit: str
    clocks: int = 0
    lines: tuple[int, ...] = ()
    loads: bool = True
    waits: tuple[int | None, int | None] = (None, None)


BARRIER, BRANCH = Event("barrier"), Event("scalar", 4)


@dataclass
class Trace:
    """Records what a machine executes: give it to `Machine.watcher`.

    Attributes:
        waves: number of a wave over the launch -> its events.
    """

    waves: dict[int, list[Event]] = field(default_factory=lambda: defaultdict(list))
    _lds: np.ndarray | int = 0
    _lines: list[np.ndarray] | None = None

    def lds(self, address: np.ndarray, lanes: np.ndarray, width: int, reads: bool) -> None:
        self._lds = self._lds + lds_clocks(address, lanes, width, reads)

    def memory(self, place: np.ndarray, lanes: np.ndarray, width: int) -> None:
        self._lines = lines_of(place, lanes, width)

    def instruction(self, operation: Operation, waves: Waves) -> None:
        i = operation.instruction
        opcode = i.opcode
        if opcode.startswith("ds_"):
            clocks = np.broadcast_to(np.maximum(self._lds, 2), waves.n)  # those that cross lanes take two
            self._add(waves, [Event("lds", int(each)) for each in clocks])
        elif opcode.startswith(("buffer_", "global_")):
            lines = self._lines or [np.empty(0, int)] * waves.n
            loads = "store" not in opcode
            events = [Event("memory", max(4, len(each)), tuple(each.tolist()), loads) for each in lines]
            self._add(waves, events)
        else:
            self._add(waves, [self._plain(i)] * waves.n)
        self._lds, self._lines = 0, None

    def _plain(self, i: Instruction) -> Event:
        opcode = i.opcode
        if opcode == "s_waitcnt":
            found = dict(re.findall(r"(\w+)\((\d+)\)", i.operands[0]))
            waits = [int(found[name]) if name in found else None for name in ("vmcnt", "lgkmcnt")]
            return Event("wait", waits=(waits[0], waits[1]))
        if opcode.startswith("s_load"):
            return Event("constant")
        if opcode == "s_nop":
            return Event("pause", 4 * (1 + int(i.operands[0], 0)))
        if opcode.startswith("s_"):
            return Event("scalar", 4)
        if matrix := matrix_clocks(opcode, "gfx908"):
            return Event("matrix", matrix)
        return Event("vector", vector_clocks(f"{opcode}_{i.encoding}" if i.encoding else opcode))

    def end(self, instruction: Instruction, waves: Waves) -> None:
        """A branch, a barrier or the end."""
        event = BARRIER if instruction.opcode == "s_barrier" else BRANCH
        self._add(waves, [event] * waves.n)

    def _add(self, waves: Waves, events: list[Event]) -> None:
        for wave, event in zip(waves.ids.tolist(), events, strict=True):
            self.waves[wave].append(event)
