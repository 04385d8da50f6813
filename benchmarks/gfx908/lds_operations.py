"""Instructions of LDS, and those that move values between lanes by way of its crossbar.

Semantics: the MI100 ISA guide, "Data Share Operations". They complete in order, and lgkmcnt counts them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.gfx908.assembly import Instruction, registers
from benchmarks.gfx908.faults import Unsupported
from benchmarks.gfx908.lds import Lds
from benchmarks.gfx908.operations import Operation, constant, made, only, operation, result
from benchmarks.gfx908.waves import LANES, Flight, Waves

_WIDTHS = {"b32": 4, "b64": 8, "b96": 12, "b128": 16}
_HALVES = ("ds_read_u16", "ds_write_b16", "ds_write_b16_d16_hi")


def widths(instruction: Instruction) -> int | None:
    """Bytes that an instruction of LDS reads or writes in one piece; None of one that touches no LDS."""
    opcode = instruction.opcode
    if opcode in _HALVES:
        return 2
    if not opcode.startswith(("ds_read", "ds_write")):
        return None
    return _WIDTHS.get(opcode.rpartition("_")[2])


def _places(i: Instruction) -> list[int]:
    """Byte offsets of the pieces that an instruction accesses."""
    width = widths(i)
    if "read2" not in i.opcode and "write2" not in i.opcode:
        only(i, "offset")
        return [int(i.modifiers.get("offset", "0"), 0)]
    only(i, "offset0", "offset1")
    scale = width * (64 if "st64" in i.opcode else 1)
    return [int(i.modifiers.get(name, "0"), 0) * scale for name in ("offset0", "offset1")]


def lds_of(waves: Waves) -> Lds:
    return waves.machine.lds


def _tell(waves: Waves, address: np.ndarray, width: int, reads: bool) -> None:
    if waves.machine.watcher is not None:
        waves.machine.watcher.lds(address, waves.lanes, width, reads)


@operation(
    "ds_read_b32",
    "ds_read_b64",
    "ds_read_b128",
    "ds_read2_b32",
    "ds_read2_b64",
    "ds_read2st64_b32",
    "ds_read2st64_b64",
    "ds_read_u16",
)
def _read(i: Instruction) -> Operation:
    into, width, places = registers(i.operands[0]), widths(i), _places(i)
    address = result(i.operands[1])
    if into is None or into.kind != "v" or into.count * 4 != max(4, width) * len(places):
        raise Unsupported(f"{i.operands[0]} as a result of {width} bytes is not modelled")

    def run(waves: Waves) -> None:
        lds, register, units = lds_of(waves), into.first, []
        base = waves.v[address].astype(np.int64)
        for place in places:
            where = lds.addresses(waves, base + place, width)
            _tell(waves, base + place, width, reads=True)
            units += lds.read(waves, where, width)
            if width == 2:
                waves.put(register, lds.halves[where >> 1])
                continue
            word = where >> 2
            for n in range(width // 4):
                waves.put(register, lds.words[word + n])
                register += 1
        waves.fly(lds.flight(i.text, into.numbers, units, writes=False))

    return made(i, run)


@operation(
    "ds_write_b32",
    "ds_write_b64",
    "ds_write_b128",
    "ds_write2_b32",
    "ds_write2_b64",
    "ds_write2st64_b32",
    "ds_write2st64_b64",
    "ds_write_b16",
    "ds_write_b16_d16_hi",
)
def _write(i: Instruction) -> Operation:
    address, width, places = result(i.operands[0]), widths(i), _places(i)
    data = [registers(text) for text in i.operands[1:]]
    if len(data) != len(places) or any(d is None or d.kind != "v" or d.count * 4 < width for d in data):
        raise Unsupported(f"data of {width} bytes from {', '.join(i.operands[1:])} is not modelled")
    high = i.opcode.endswith("d16_hi")

    def run(waves: Waves) -> None:
        lds, units = lds_of(waves), []
        base = waves.v[address].astype(np.int64)
        for place, from_ in zip(places, data, strict=True):
            where = lds.addresses(waves, base + place, width)
            _tell(waves, base + place, width, reads=False)
            if width == 2:
                value = (waves.v[from_.first] >> np.uint32(16 if high else 0)).astype(np.uint16)
                units += lds.write(waves, where, width, lds.halves, [value])
            else:
                values = [waves.v[from_.first + n] for n in range(width // 4)]
                units += lds.write(waves, where, width, lds.words, values)
        waves.fly(lds.flight(i.text, frozenset(), units, writes=True))

    return made(i, run, results=0)


@operation("ds_bpermute_b32")
def _gathered(i: Instruction) -> Operation:
    """Each lane reads the lane that its address names, modulo 64 lanes of 4 bytes; an inactive one reads as 0."""
    only(i)
    register, address, data = (result(text) for text in i.operands)

    def lane(waves: Waves) -> np.ndarray:
        return ((waves.v[address] >> np.uint32(2)) & np.uint32(LANES - 1)).astype(np.intp)

    return _crossed(i, register, data, lane)


@operation("ds_swizzle_b32")
def _swizzled(i: Instruction) -> Operation:
    """swizzle(SWAP, n): lanes exchange in blocks of n; swizzle(BITMASK_PERM) by a mask; within 32 lanes each."""
    only(i, "offset")
    lanes = np.arange(LANES)
    source_lanes = (lanes & 32) | _pattern(i.modifiers.get("offset", "0"))(lanes & 31)
    return _crossed(
        i, result(i.operands[0]), result(i.operands[1]), lambda w: np.broadcast_to(source_lanes, (w.n, LANES))
    )


def _pattern(text: str) -> Callable[[np.ndarray], np.ndarray]:
    if text.startswith("swizzle(SWAP,"):
        block = int(text.removeprefix("swizzle(SWAP,").rstrip(")"))
        return lambda lanes: lanes ^ block
    value = constant(text, "u32")
    if value is None or value >> 15:
        raise Unsupported(f"the pattern {text} is not modelled")
    keep, force, flip = value & 31, (value >> 5) & 31, (value >> 10) & 31
    return lambda lanes: ((lanes & keep) | force) ^ flip


def _crossed(i: Instruction, register: int, data: int, lane: Callable[[Waves], np.ndarray]) -> Operation:
    def run(waves: Waves) -> None:
        source = lane(waves)
        value = np.take_along_axis(waves.v[data], source, axis=1)
        if not waves.full:
            value = np.where(np.take_along_axis(waves.lanes, source, axis=1), value, 0)
        waves.put(register, value)
        waves.fly(Flight("lgkmcnt", True, frozenset({register}), i.text))

    def read(waves: Waves) -> np.ndarray:
        lanes = np.zeros((waves.n, LANES), bool)
        wave = np.broadcast_to(np.arange(waves.n)[:, None], lanes.shape)
        lanes[wave[waves.lanes], lane(waves)[waves.lanes]] = True
        return lanes & waves.lanes

    operation = made(i, run)
    if len(i.operands) == 2 or result(i.operands[1]) != data:
        operation.needs[data] = read
    return operation
