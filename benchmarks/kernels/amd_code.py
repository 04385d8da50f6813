"""What AMD's assembly says of a kernel's loops: barriers, copies of accumulators, loads, clocks of both units.

All readings are of the text as compiled. A reduction so short that it is unrolled whole has no loop, and reads as zero.
"""

import re

from benchmarks.kernels.control_flow import AMD, Flow
from benchmarks.kernels.opcodes import counted

_OPCODE = re.compile(r"\s+([a-z]\w+)")
_DRAIN = re.compile(r"\s+s_waitcnt\b.*\bvmcnt\(0\)")
_COPIES = ("v_accvgpr_read", "v_accvgpr_write", "v_accvgpr_mov")
_GLOBAL_LOADS = ("buffer_load_", "global_load_", "flat_load_")

# A SIMD has 16 lanes, so a wave of 64 takes 4 clocks; transcendental functions and 32-bit integer products run at a
# quarter of that rate (LLVM's SISchedule.td).
_VECTOR_CLOCKS = 4
_QUARTER_RATE = re.compile(
    r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_|v_mul_(?:lo_u32|hi_[iu]32)|v_mad_[iu]64_[iu]32"
)
_MFMA = re.compile(
    r"v_mfma_[a-z]+\d+_(?P<rows>\d+)x\d+x\d+_?(?P<blocks>\d+b_)?(?P<type>bf16|f16|f32|xf32|i8|fp8|bf8)"
)
# Of CDNA 1 and 2; four clocks a pass. AMD's matrix instruction calculator, and the CDNA 1 to 3 ISA documents.
_MATRIX_CLOCKS_BY_ROWS = {32: 64, 16: 32, 4: 8}


class AmdCode:
    """The assembly of one kernel."""

    def __init__(self, assembly: str):
        self.lines = assembly.splitlines()
        self.opcodes = [m.group(1) if m else "" for m in map(_OPCODE.match, self.lines)]
        self.flow = Flow(self.lines, AMD)
        self._inside = self.flow.lines_in_loops()

    def in_loops(self, *prefixes: str) -> list[int]:
        """Numbers of the lines in loops whose opcode starts so."""
        return [
            number
            for number, opcode in enumerate(self.opcodes)
            if self._inside[number] and opcode.startswith(prefixes)
        ]

    def barriers(self) -> int:
        """Barriers in loops."""
        return len(self.in_loops("s_barrier"))

    def drained_barriers(self) -> int:
        """Barriers in loops before which the wave waits until none of its global loads is under way.

        Such a wait makes prefetching void. LLVM puts `s_waitcnt vmcnt(0) lgkmcnt(0)` directly before every barrier on
        gfx908, unless the feature back-off-barrier is on. A wait for data that is used before the barrier counts not:
        without a prefetch there is nothing else to do.
        """
        starts = {block[0] for block in self.flow.blocks if block}
        return sum(self._is_drained(number, starts) for number in self.in_loops("s_barrier"))

    def _is_drained(self, barrier: int, block_starts: set[int]) -> bool:
        number = barrier
        while number not in block_starts:
            number -= 1
            opcode = self.opcodes[number]
            if _DRAIN.match(self.lines[number]):
                return True
            if opcode == "s_barrier" or (opcode and not opcode.startswith("s_")):
                return False
        return False

    def matrix_loops(self) -> list[list[int]]:
        """The blocks of each innermost loop with matrix instructions."""
        return self.flow.innermost_loops(self.in_loops("v_mfma"))

    def accumulator_copies(self) -> int:
        """Moves between the accumulators and other registers in `matrix_loops`: sums should stay where they are."""
        return sum(
            self.opcodes[number].startswith(_COPIES)
            for loop in self.matrix_loops()
            for number in self.flow.lines(loop)
        )

    def loop_clocks(self, arch: str) -> tuple[int, int]:
        """Clocks a wave for which vector and matrix unit are busy, once around the heaviest of `matrix_loops`.

        Every line counts once, also those of branches of which only one is taken. (0, 0) without such a loop.
        """
        clocks = [self.path_clocks(loop, arch) for loop in self.matrix_loops()]
        return max(clocks, key=lambda pair: pair[1], default=(0, 0))

    def path_clocks(self, blocks: list[int], arch: str) -> tuple[int, int]:
        """As `loop_clocks`, of these blocks."""
        opcodes = [self.opcodes[number] for number in self.flow.lines(blocks)]
        return sum(map(vector_clocks, opcodes)), sum(matrix_clocks(opcode, arch) for opcode in opcodes)

    def global_loads(self) -> str:
        """Loads from global memory in loops, by width: "buffer_load_dwordx4 x4"."""
        return counted([self.opcodes[number] for number in self.in_loops(*_GLOBAL_LOADS)])


def vector_clocks(opcode: str) -> int:
    """Clocks of a SIMD's vector unit for a wave's instruction; 0 of any other unit's."""
    if not opcode.startswith("v_") or opcode.startswith(("v_mfma", "v_smfma")):
        return 0
    return _VECTOR_CLOCKS * (4 if _QUARTER_RATE.match(opcode) else 1)


def matrix_clocks(opcode: str, arch: str) -> int:
    """Clocks of a SIMD's matrix unit for an instruction; 0 of any other unit's.

    Raises:
        ValueError: a matrix instruction that the table does not know.
    """
    if not opcode.startswith(("v_mfma", "v_smfma")):
        return 0
    parts = _MFMA.match(opcode)
    clocks = _MATRIX_CLOCKS_BY_ROWS.get(int(parts["rows"])) if parts else None
    if clocks is None:
        raise ValueError(
            f"the clocks of {opcode} are unknown; add them to amd_code.py from AMD's ISA document"
        )
    # CDNA 3 doubled the rate of the narrow types, but for instructions that compute several blocks.
    doubled = arch == "gfx942" and parts["type"] != "f32" and not parts["blocks"]
    return clocks // 2 if doubled else clocks
