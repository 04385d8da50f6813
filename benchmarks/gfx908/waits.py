"""Waits on every way through the text: no register is used before the `s_waitcnt` that covers its load, run or not.

While code runs, the same is watched on the ways that are taken (`machine.py`). Here, for each place in the text, what
may be under way when control comes to it: of each register the youngest load, over all ways. Compilers place waits for
all ways at once, so that what is found here is a fault of theirs, or planted.
"""

from __future__ import annotations

import re

from benchmarks.gfx908.assembly import name_of
from benchmarks.gfx908.faults import Fault
from benchmarks.gfx908.machine import Program, follows
from benchmarks.gfx908.operations import Operation
from benchmarks.gfx908.waves import COUNTERS

# Register -> the load that will write it, and how many accesses of the same counter have been issued since.
Flights = dict[int, tuple[Operation, int]]


def counter_of(operation: Operation) -> tuple[str, bool] | None:
    """The counter that an instruction adds to, and whether it returns in order; None where it adds to none."""
    opcode = operation.instruction.opcode
    if opcode.startswith(("buffer_", "global_")):
        return "vmcnt", True
    if opcode.startswith("ds_"):
        return "lgkmcnt", True
    if opcode.startswith("s_load_"):
        return "lgkmcnt", False
    return None


def check(program: Program) -> None:
    """Raise the first Fault of kind "wait" that the text has."""
    before: dict[int, Flights] = {0: {}}
    waiting = [0]
    while waiting:
        at = waiting.pop()
        flights = dict(before[at])
        for operation in program.stretches[at].operations:
            _step(operation, flights)
        for after in program.successors(at):
            if after < len(program.stretches) and _merge(before, after, flights):
                waiting.append(after)


def _merge(before: dict[int, Flights], at: int, flights: Flights) -> bool:
    """Add what may be under way when control comes to a stretch; whether that is anything new."""
    if at not in before:
        before[at] = dict(flights)
        return True
    known, new = before[at], False
    for number, (load, age) in flights.items():
        if number not in known or age < known[number][1]:
            known[number], new = (load, age), True
    return new


def _step(operation: Operation, flights: Flights) -> None:
    """Bring what is under way past an instruction.

    Raises:
        Fault: it uses a register that is to come.
    """
    if operation.instruction.opcode == "s_waitcnt":
        for name, most in re.findall(r"(\w+)\((\d+)\)", operation.instruction.operands[0]):
            _wait(flights, name, int(most))
        return
    for number in operation.touched & flights.keys():
        load, _ = flights[number]
        if number in operation.reads or not follows(operation, *counter_of(load)):
            i, earlier = operation.instruction, load.instruction
            detail = f"{name_of(number)} is used while line {earlier.line}: {earlier.text} may be under way"
            raise Fault("wait", f"{detail}; line {i.line}: {i.text}")
    adds = counter_of(operation)
    if adds is None:
        return
    # A counter that is full holds an access back until its oldest has come.
    _wait(flights, adds[0], COUNTERS[adds[0]] - 1)
    for number, (load, age) in flights.items():
        if counter_of(load)[0] == adds[0]:
            flights[number] = (load, age + 1)
    flights.update(dict.fromkeys(operation.writes, (operation, 0)))


def _wait(flights: Flights, counter: str, most: int) -> None:
    """Land what has come when the counter is down to `most`; see `Waves.wait`."""
    mine = {n: age for n, (load, age) in flights.items() if counter_of(load)[0] == counter}
    if most and not all(counter_of(flights[number][0])[1] for number in mine):
        return
    for number, age in mine.items():
        if age >= most:
            del flights[number]
