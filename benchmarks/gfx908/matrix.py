"""Matrix instructions and accumulators.

Layout: AMD matrix instruction calculator, and the MI100 ISA guide, "VOP3P instructions" (MFMA). With M = 32 or 16 rows,
the 64 lanes are 64 / M groups of M. Lane g * M + i holds row i of A (column i of B) at k = J * g + j, for its J values
j; result register r of lane g * M + i holds column i of row 8 * floor(r / 4) + 4 * g + r % 4 (M = 32) or 4 * g + r
(M = 16). EXEC does not count.

Arithmetic: no document says in which order the hardware adds or where it rounds. Here the products of one instruction
and the accumulator are added in float64 and rounded once to float32; where all sums are exact, as of small integers,
any order gives the same bits. Denormals are kept: flushing them came with the MI200 (MIOpen's documentation, "MI200
MFMA behavior specifics").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.gfx908.assembly import Instruction, registers
from benchmarks.gfx908.faults import Unsupported
from benchmarks.gfx908.operations import (
    Operation,
    computed,
    constant,
    made,
    only,
    operation,
    result,
    source,
    span,
)
from benchmarks.gfx908.waves import LANES, Waves


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 as bfloat16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@dataclass(frozen=True)
class Shape:
    """One matrix instruction: `rows` x `rows` results, `depth` products each."""

    rows: int
    depth: int
    values: Callable[[np.ndarray], np.ndarray]  # uint32 [..., registers] -> float32 [..., values]

    @property
    def groups(self) -> int:
        return LANES // self.rows

    @property
    def passes(self) -> int:
        """Of four clocks each (LLVM's SISchedule.td)."""
        return {32: 16, 16: 8}[self.rows]


def _halves(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def _brain_floats(bits: np.ndarray) -> np.ndarray:
    return from_bf16(bits.view(np.uint16))


def _floats(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


SHAPES = {
    "v_mfma_f32_32x32x8f16": Shape(32, 8, _halves),
    "v_mfma_f32_16x16x16f16": Shape(16, 16, _halves),
    "v_mfma_f32_32x32x4bf16": Shape(32, 4, _brain_floats),
    "v_mfma_f32_16x16x8bf16": Shape(16, 8, _brain_floats),
    "v_mfma_f32_32x32x2f32": Shape(32, 2, _floats),
    "v_mfma_f32_16x16x4f32": Shape(16, 4, _floats),
}


def _operand(text: str, shape: Shape) -> Callable[[Waves], np.ndarray]:
    """Reads A (or B) as float64 [waves, rows, depth]."""
    found = registers(text)
    if found is None or found.kind == "s":
        raise Unsupported(f"{text} as an operand of a matrix instruction is not modelled")
    first, count = found.first, found.count

    def read(waves: Waves) -> np.ndarray:
        bank = waves.v if found.kind == "v" else waves.a
        bits = np.ascontiguousarray(np.moveaxis(bank[first : first + count], 0, -1))  # [waves, 64, registers]
        values = shape.values(bits).reshape(waves.n, shape.groups, shape.rows, -1)
        return values.transpose(0, 2, 1, 3).reshape(waves.n, shape.rows, shape.depth).astype(np.float64)

    return read


def to_registers(tile: np.ndarray, shape: Shape) -> np.ndarray:
    """[waves, rows, columns] as result registers [registers, waves, 64]."""
    waves = len(tile)
    parts = tile.reshape(waves, -1, shape.groups, 4, shape.rows)  # row = (4 * groups) * q + 4 * group + r % 4
    return parts.transpose(1, 3, 0, 2, 4).reshape(-1, waves, LANES)


@operation(*SHAPES)
def _multiplied(i: Instruction) -> Operation:
    only(i)
    shape = SHAPES[i.opcode]
    into, a, b = span(i.operands[0], "a"), *(_operand(text, shape) for text in i.operands[1:3])
    first, last = into.first, into.first + into.count
    if into.count * LANES != shape.rows**2:
        raise Unsupported(f"{into.count} registers for {shape.rows} x {shape.rows} results")
    start = constant(i.operands[3], "f32")
    addend = span(i.operands[3], "a").first if start is None else None

    def run(waves: Waves) -> None:
        product = to_registers(np.matmul(a(waves), b(waves).transpose(0, 2, 1)), shape)
        if addend is None:
            product += np.array(start, np.uint32).view(np.float32)
        else:
            product += waves.a[addend : addend + into.count].view(np.float32)
        waves.a[first:last] = product.astype(np.float32).view(np.uint32)

    def everyone(waves: Waves) -> np.ndarray:
        return waves.everyone

    operation = made(i, run, lanes=everyone)
    operation.needs.update(dict.fromkeys(operation.reads, everyone))
    return operation


@operation("v_accvgpr_read_b32")
def _from_accumulator(i: Instruction) -> Operation:
    only(i)
    register, number = result(i.operands[0]), span(i.operands[1], "a").first
    return computed(i, lambda w: w.put(register, w.a[number]))


@operation("v_accvgpr_write_b32")
def _to_accumulator(i: Instruction) -> Operation:
    only(i)
    number, read = span(i.operands[0], "a").first, source(i.operands[1], "u32")

    def run(waves: Waves) -> None:
        np.copyto(waves.a[number], read(waves), where=waves.lanes)

    return computed(i, run)
