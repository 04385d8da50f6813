"""Runs a kernel: some workgroups side by side, block by block, each instruction for all of their waves at once.

Waves that branch differently part, and go on as one where they come to the same place. The block that comes first in
the text runs first, so that those who skip something wait for those who do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gfx908 import (  # noqa: F401  they register what they know
    lds_operations,
    matrix,
    memory_operations,
    scalar,
    vector_float,
    vector_integer,
)
from benchmarks.gfx908.assembly import ACCUMULATOR, SCALAR, Instruction, Kernel, name_of
from benchmarks.gfx908.faults import Fault, Unsupported
from benchmarks.gfx908.lds import Lds
from benchmarks.gfx908.lds_operations import widths
from benchmarks.gfx908.memory import Memory
from benchmarks.gfx908.operations import VCC_BITS, Operation, build, made, operation
from benchmarks.gfx908.waves import COUNTERS, Waves

_BRANCHES: dict[str, Callable[[Waves], np.ndarray]] = {
    "s_branch": lambda w: np.ones(w.n, bool),
    "s_cbranch_scc0": lambda w: ~w.scc,
    "s_cbranch_scc1": lambda w: w.scc,
    "s_cbranch_vccz": lambda w: w.vcc == 0,
    "s_cbranch_vccnz": lambda w: w.vcc != 0,
    "s_cbranch_execz": lambda w: w.exec == 0,
    "s_cbranch_execnz": lambda w: w.exec != 0,
}
_MOST_STRETCHES = 1_000_000  # that one run may take: our longest loops go round a few hundred times
_NOTHING = ("s_nop", "s_setprio", "s_sleep")


@operation(*_NOTHING)
def _nothing(i: Instruction) -> Operation:
    return made(i, lambda waves: None, results=0)


@operation("s_waitcnt")
def _wait(i: Instruction) -> Operation:
    """MI100 ISA guide, "Data Dependency Resolution". expcnt counts only what our kernels do not do."""
    found = re.findall(r"(\w+)\((\d+)\)", i.operands[0])
    if not found or {name for name, _ in found} - set(COUNTERS):
        raise Unsupported(f"the operand {i.operands[0]} is not modelled")
    waits = [(name, int(most)) for name, most in found if int(most) < COUNTERS[name]]

    def run(waves: Waves) -> None:
        for name, most in waits:
            waves.wait(name, most)

    return made(i, run, results=0)


@dataclass(frozen=True)
class Stretch:
    """Instructions that run in a row, and the one that ends them: a branch, a barrier, the end, or None."""

    operations: tuple[Operation, ...]
    end: Instruction | None


class Program:
    """A kernel, decoded.

    Attributes:
        stretches: in the order of the text.
        vectors, accumulators: how many registers of each kind it uses.
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        ends = {*_BRANCHES, "s_barrier", "s_endpgm"}
        starts = {0, *kernel.labels.values()}
        starts |= {n + 1 for n, i in enumerate(kernel.instructions) if i.opcode in ends}
        self.stretches: list[Stretch] = []
        self._at: dict[int, int] = {}
        start = 0
        for stop in [*sorted(starts - {0}), len(kernel.instructions)]:
            part = kernel.instructions[start : min(stop, len(kernel.instructions))]
            self._at[start] = len(self.stretches)
            end = part[-1] if part and part[-1].opcode in ends else None
            body = part[:-1] if end else part
            self.stretches.append(Stretch(tuple(build(i) for i in body), end))
            start = stop
        used = [number for s in self.stretches for o in s.operations for number in o.touched]
        self.vectors = 1 + max((n for n in used if n < ACCUMULATOR), default=0)
        self.accumulators = 1 + max((n - ACCUMULATOR for n in used if ACCUMULATOR <= n < SCALAR), default=-1)
        narrowest = [w for i in kernel.instructions if (w := widths(i))]
        self.lds_unit = min(4 if w == 12 else w for w in narrowest) if narrowest else 4

    def successors(self, at: int) -> list[int]:
        """The stretches that can come after a stretch."""
        end = self.stretches[at].end
        if end is None or end.opcode == "s_barrier":
            return [at + 1]
        if end.opcode == "s_endpgm":
            return []
        return [self.target(end)] if end.opcode == "s_branch" else [self.target(end), at + 1]

    def target(self, branch: Instruction) -> int:
        """The stretch that a branch goes to."""
        label = branch.operands[0]
        if label not in self.kernel.labels:
            raise Unsupported(f"line {branch.line}: {branch.text}: no such label")
        return self._at[self.kernel.labels[label]]


class Machine:
    """Some workgroups of a launch, while they run.

    Attributes:
        watcher: is told of each instruction and each access, where there is one (see busy.py).
    """

    watcher: Any = None

    def __init__(
        self, program: Program, memory: Memory, workgroups: int, most_stretches: int = _MOST_STRETCHES
    ):
        self.program, self.memory, self.most_stretches = program, memory, most_stretches
        self.lds = Lds(workgroups, program.kernel.lds_bytes, program.lds_unit)
        self.waiting: list[tuple[Instruction, int, Waves]] = []  # barrier, where to go on, who
        self.ended = np.zeros(workgroups, int)

    def run(self, waves: Waves) -> None:
        """Run to the end.

        Raises:
            Fault: with the line and the text of the instruction.
        """
        ready: list[tuple[int, Waves]] = [(0, waves)]
        left = self.most_stretches
        with np.errstate(all="ignore"):
            while ready:
                left -= 1
                if not left:
                    raise ready[0][1].fault(
                        "endless", f"{self.most_stretches} stretches of instructions, and no end"
                    )
                ready.sort(key=lambda pair: pair[0])
                block, group = ready.pop(0)
                while ready and ready[0][0] == block and group.joins(ready[0][1]):
                    group = group.join(ready.pop(0)[1])
                ready += self._step(block, group)
        if self.waiting:
            barrier, _, group = self.waiting[0]
            found = sorted({b.line for b, _, _ in self.waiting})
            raise group.fault("barrier", f"waves wait at the barriers of lines {found} and go on at none").at(
                f"line {barrier.line}: {barrier.text}"
            )

    def _step(self, block: int, group: Waves) -> list[tuple[int, Waves]]:
        """Run one stretch; (stretch, waves) that go on."""
        stretch = self.program.stretches[block]
        at = None
        try:
            for at in stretch.operations:
                if not group.watched.isdisjoint(at.touched):
                    _look(group, at)
                at.run(group)
                if self.watcher is not None:
                    self.watcher.instruction(at, group)
        except Fault as fault:
            raise fault.at(f"line {at.instruction.line}: {at.instruction.text}") from None
        end = stretch.end
        if end is None:
            return [(block + 1, group)]
        if self.watcher is not None:
            self.watcher.end(end, group)
        if end.opcode == "s_endpgm":
            return self._end(group, end)
        if end.opcode == "s_barrier":
            return self._meet(group, end, block + 1)
        if end.opcode.startswith("s_cbranch_vcc") and not group.undefined.keys().isdisjoint(VCC_BITS):
            detail = "a branch by VCC, which holds nothing yet"
            raise group.fault("undefined register", detail).at(f"line {end.line}: {end.text}")
        taken = _BRANCHES[end.opcode](group)
        target = self.program.target(end)
        if taken.all():
            return [(target, group)]
        if not taken.any():
            return [(block + 1, group)]
        return [(target, group.take(np.flatnonzero(taken))), (block + 1, group.take(np.flatnonzero(~taken)))]

    def _end(self, group: Waves, end: Instruction) -> list[tuple[int, Waves]]:
        np.add.at(self.ended, group.workgroup, 1)
        left = [w for _, _, w in self.waiting if np.isin(w.workgroup, group.workgroup).any()]
        if left:
            raise group.fault("barrier", "a wave ends while others wait at a barrier").at(f"line {end.line}")
        return []

    def _meet(self, group: Waves, barrier: Instruction, after: int) -> list[tuple[int, Waves]]:
        """Hold waves until all of their workgroup have come."""
        if self.ended[group.workgroup].any():
            raise group.fault("barrier", "a wave waits for others that have ended").at(f"line {barrier.line}")
        self.waiting.append((barrier, after, group))
        workgroups, arrived = np.unique(
            np.concatenate([w.workgroup for _, _, w in self.waiting]), return_counts=True
        )
        complete = workgroups[arrived == self.program.kernel.waves]
        if not len(complete):
            return []
        here = [(b, a, w) for b, a, w in self.waiting if np.isin(w.workgroup, complete).any()]
        for one in complete:
            lines = {b.line for b, _, w in here if (w.workgroup == one).any()}
            if len(lines) > 1:
                detail = f"waves of workgroup {one} meet at the barriers of lines {sorted(lines)}"
                raise group.fault("barrier", detail).at(f"line {barrier.line}: {barrier.text}")
        self.waiting = [entry for entry in self.waiting if not np.isin(entry[2].workgroup, complete).any()]
        going: list[tuple[int, Waves]] = []
        for b, a, w in here:
            free = np.isin(w.workgroup, complete)
            if free.all():
                going.append((a, w))
                continue
            going.append((a, w.take(np.flatnonzero(free))))
            self.waiting.append((b, a, w.take(np.flatnonzero(~free))))
        self.lds.epoch[complete] += 1
        for _, w in going:
            self.lds.carry_over(w)
        return going


def _look(waves: Waves, at: Operation) -> None:
    """Whether an instruction touches what is under way or undefined, and what it defines.

    Raises:
        Fault: it does.
    """
    for number in at.touched & waves.pending.keys():
        flight = waves.pending[number]
        if number in at.reads or not follows(at, flight.counter, flight.ordered):
            raise waves.fault("wait", f"{name_of(number)} is used while {flight.text} is under way")
    spoilt: dict[int, np.ndarray] = {}  # undefined register that is read -> the lanes that are
    for number in at.reads & waves.undefined.keys():
        need = at.needs.get(number)
        lanes = waves.undefined_lanes(number) & (need(waves) if need else waves.lanes)
        if lanes.any():
            if at.depends is None:
                raise waves.fault("undefined register", f"{name_of(number)} holds nothing yet", lanes)
            spoilt[number] = lanes
    for number in at.writes:
        lanes = at.lanes(waves) if at.lanes else waves.lanes
        bad = [spoilt[source] for source in at.depends[number] if source in spoilt] if spoilt else []
        if bad or number in waves.undefined:
            waves.written(number, lanes, np.logical_or.reduce(bad) if bad else None)


def follows(at: Operation, counter: str, ordered: bool) -> bool:
    """Whether an instruction may write what an access under way will write: a load that returns after it."""
    opcode = at.instruction.opcode
    if counter == "vmcnt":
        return opcode.startswith(("buffer_load", "global_load", "global_atomic"))
    return ordered and opcode.startswith("ds_")
