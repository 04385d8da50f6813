"""Runs a few lines of gfx908 assembly on one wave, or some, with registers as a test sets them."""

import numpy as np

from benchmarks.gfx908.assembly import SCALAR, parse
from benchmarks.gfx908.machine import Machine, Program
from benchmarks.gfx908.memory import Memory
from benchmarks.gfx908.waves import LANES, Waves

VCC = 106


def execute(
    text: str,
    v: dict[int, object] | None = None,
    s: dict[int, int] | None = None,
    a: dict[int, object] | None = None,
    exec_mask: int = 2**LANES - 1,
    scc: bool = False,
    waves: int = 1,
    lds: int = 0,
    memory: Memory | None = None,
    address: dict[int, str] | None = None,
) -> Waves:
    """The wave(s) after the lines have run.

    Args:
        v, a: vector registers, uint32, int32 or float32, one value or 64 (or [waves, 64]); s: scalar ones.
        address: scalar register -> the block of `memory` whose address it and the next one hold.
    """
    lines = "\n".join(
        f"\t{line.strip()}" if not line.strip().endswith(":") else line.strip() for line in text.split("\n")
    )
    program = Program(parse(lines + "\n\ts_endpgm\n", lds, waves))
    registers = [max((given or {-1: 0}).keys()) + 1 for given in (v, a)]
    memory = memory or Memory({})
    machine = Machine(program, memory, 1)
    numbers = np.arange(waves)
    vectors, accumulators = max(program.vectors, registers[0]), max(program.accumulators, registers[1])
    state = Waves(machine, vectors, accumulators, np.zeros(waves, int), numbers)
    for bank, given, first in ((state.v, v, 0), (state.a, a, 256)):
        for number, values in (given or {}).items():
            values = np.asarray(values)
            if values.dtype not in (np.float32, np.uint32, np.int32):
                values = (values.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
            bank[number] = values.view(np.uint32)
            state.define(first + number)
    for number, value in (s or {}).items():
        state.s[:, number] = value & 0xFFFFFFFF
        state.define(SCALAR + number)
    for number, name in (address or {}).items():
        state.s64[:, number // 2] = memory.address(name)
        state.define(SCALAR + number, 2)
    state.scc[:] = scc
    state.set_exec(np.full(waves, exec_mask, np.uint64))
    machine.run(state)
    return state


def floats(*values: float) -> np.ndarray:
    """These values, and again, for 64 lanes."""
    return np.resize(np.array(values, np.float32), LANES)


def words(*values: int) -> np.ndarray:
    return np.resize(np.array([value & 0xFFFFFFFF for value in values], np.uint32), LANES)
