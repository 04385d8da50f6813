"""How long each unit of a compute unit is busy with a workgroup, counted on the instructions that it executes.

No latency is in it: a time below which the code cannot go, however well its waves hide each other's waits. Counted are

* clocks of the vector and the matrix units: as in `benchmarks/kernels/amd_code.py` (LLVM's SISchedule.td; AMD's matrix
  instruction calculator). There are four of each, and the waves are spread evenly.
* scalar instructions and others that are issued: one in four clocks a wave of a SIMD, likewise.
* clocks of LDS: 32 banks of 4 bytes (MI100 ISA guide, "Data Share Operations"), by the addresses that occur. Lanes go
  in 128 bytes at a time, in order; those of a 16-byte read as Composable Kernel's documentation says ("Understanding
  AMD GPU LDS and Bank Conflicts"), which was written of later cards: that it holds for this one is an assumption.
* clocks of the first cache: a line of 64 bytes a clock (AMD's CDNA architecture white paper), by the addresses that
  occur.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from benchmarks.gfx908.assembly import Instruction
from benchmarks.gfx908.operations import Operation
from benchmarks.gfx908.waves import Waves
from benchmarks.kernels.amd_code import matrix_clocks, vector_clocks

SIMDS = 4
CLOCK_MHZ = 1502  # AMD Instinct MI100 data sheet, peak engine clock
_BANKS, _LINE = 32, 64
UNITS = ("vector", "matrix", "scalar", "lds", "cache")


# The lanes of a 16-byte read that go in together, and the same 32 lanes further on.
_WIDE_READ = np.array(
    [
        [*range(0, 4), *range(20, 24)],
        [*range(4, 8), *range(16, 20)],
        [*range(8, 12), *range(28, 32)],
        [*range(12, 16), *range(24, 28)],
    ]
)
_WIDE_READ = np.concatenate((_WIDE_READ, _WIDE_READ + 32)).ravel()


def lds_clocks(address: np.ndarray, lanes: np.ndarray, width: int, reads: bool) -> np.ndarray:
    """Clocks of LDS, [waves], for byte addresses [waves, 64]: of each group of lanes, the words in the fullest bank."""
    if width == 16 and reads:
        address, lanes = address[:, _WIDE_READ], lanes[:, _WIDE_READ]
    together = min(32, 128 // width)
    words = (address[..., None] + np.arange(0, max(width, 4), 4)) // 4
    words = np.where(lanes[..., None], words, -1).reshape(-1, together * words.shape[-1])
    words = np.sort(words, axis=1)
    first = np.ones(words.shape, bool)
    first[:, 1:] = words[:, 1:] != words[:, :-1]  # lanes that read the same word share it
    rows, columns = np.nonzero(first & (words >= 0))
    load = np.zeros((len(words), _BANKS), np.int64)
    np.add.at(load, (rows, words[rows, columns] % _BANKS), 1)
    return load.max(axis=1).reshape(len(address), -1).sum(axis=1)


def lines_of(place: np.ndarray, lanes: np.ndarray, width: int) -> list[np.ndarray]:
    """The lines of the first cache that each wave's access touches."""
    ends = np.concatenate((place, place + width - 1), axis=1) // _LINE
    active = np.concatenate((lanes, lanes), axis=1)
    return [np.unique(ends[wave][active[wave]]) for wave in range(len(place))]


@dataclass
class Busy:
    """Counts what a machine executes: give it to `Machine.watcher`.

    Attributes:
        clocks: unit -> clocks, of all waves together; `least_lds` are LDS's if no two lanes met in a bank.
        executed: instructions, of all waves.
        lines: cache lines of memory that were touched.
    """

    clocks: Counter = field(default_factory=Counter)
    least_lds: int = 0
    executed: int = 0
    lines: set[int] = field(default_factory=set)

    def instruction(self, operation: Operation, waves: Waves) -> None:
        i = operation.instruction
        name = f"{i.opcode}_{i.encoding}" if i.encoding else i.opcode
        self.executed += waves.n
        matrix = matrix_clocks(i.opcode, "gfx908")
        self.clocks["matrix"] += waves.n * matrix
        # a matrix instruction takes the vector unit's issue for one instruction's time
        self.clocks["vector"] += waves.n * (4 if matrix else vector_clocks(name))
        if i.opcode.startswith("s_") and not i.opcode.startswith(("s_nop", "s_waitcnt")):
            self.clocks["scalar"] += waves.n * 4

    def end(self, instruction: Instruction, waves: Waves) -> None:
        """A branch, a barrier or the end."""
        self.executed += waves.n
        self.clocks["scalar"] += waves.n * 4

    def lds(self, address: np.ndarray, lanes: np.ndarray, width: int, reads: bool) -> None:
        self.clocks["lds"] += int(lds_clocks(address, lanes, width, reads).sum())
        self.least_lds += int(-(-lanes.sum(axis=1) * width // 128).sum())

    def memory(self, place: np.ndarray, lanes: np.ndarray, width: int) -> None:
        for lines in lines_of(place, lanes, width):
            self.clocks["cache"] += len(lines)
            self.lines.update(lines.tolist())

    def of_a_workgroup(self) -> dict[str, float]:
        """Unit -> clocks that it is busy with the one workgroup that was counted."""
        shared = {"vector": SIMDS, "matrix": SIMDS, "scalar": SIMDS}
        return {unit: self.clocks[unit] / shared.get(unit, 1) for unit in UNITS}
