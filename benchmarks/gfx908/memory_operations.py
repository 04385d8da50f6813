"""Instructions that read and write memory: buffers, global addresses, and scalar loads.

Semantics: the MI100 ISA guide, "Scalar Memory Operations", "Vector Memory Operations", "Flat Memory Instructions".
Buffer and global accesses return in order, and vmcnt counts loads and stores alike; scalar loads return in any order,
and lgkmcnt counts them. Buffers are raw (a stride of 0): an access at or beyond the descriptor's number of bytes reads
zero and writes nothing, by which Triton masks lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.gfx908.assembly import Instruction, registers
from benchmarks.gfx908.faults import Unsupported
from benchmarks.gfx908.memory import Block, Memory
from benchmarks.gfx908.operations import EXEC_BITS, Operation, constant, made, only, operation, result, span
from benchmarks.gfx908.scalar import scalar_source
from benchmarks.gfx908.waves import LANES, Flight, Waves

_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "dwordx8": 32, "dwordx16": 64}
_WIDTHS |= {"ushort": 2, "short": 2}
_SWIZZLED, _THREAD_ID = np.uint32(1 << 31), np.uint32(1 << 23)

# -> places [waves, 64], lanes that access memory, the tensors
Places = Callable[[Waves], tuple[np.ndarray, np.ndarray, list[Block]]]


def _memory(waves: Waves) -> Memory:
    return waves.machine.memory


def _width(i: Instruction) -> int:
    return _WIDTHS[i.opcode.rpartition("_")[2]]


def _offset(i: Instruction) -> int:
    return int(i.modifiers.get("offset", "0"), 0)


def _buffer(i: Instruction, width: int) -> Places:
    """Places of a buffer access; its operands are data, offset, descriptor, scalar offset."""
    only(i, "offen", "offset", "glc", "slc")
    address, descriptor, scalar = i.operands[1:]
    first, immediate, base_offset = span(descriptor, "s").first, _offset(i), scalar_source(scalar, False)
    vector = result(address) if "offen" in i.modifiers else None

    def places(waves: Waves) -> tuple[np.ndarray, np.ndarray, list[Block]]:
        w0, w1, size, flags = (waves.s[:, first + n] for n in range(4))
        if (
            ((w1 >> np.uint32(16)) & np.uint32(0x3FFF)).any()
            or (w1 & _SWIZZLED).any()
            or (flags & _THREAD_ID).any()
        ):
            raise Unsupported(f"{i.text}: a buffer with a stride, swizzled or by thread is not modelled")
        base = (w0.astype(np.int64)) | ((w1 & np.uint32(0xFFFF)).astype(np.int64) << 32)
        scalar_offset = np.broadcast_to(base_offset(waves), waves.n).astype(np.int64)
        if vector is None:
            offset = np.full((waves.n, LANES), immediate, np.int64)
        else:
            offset = waves.v[vector].astype(np.int64) + immediate
        lanes = waves.lanes & (offset < (size.astype(np.int64) - scalar_offset)[:, None])
        address = offset + (base + scalar_offset)[:, None]
        place, blocks = _memory(waves).inside(waves, address, lanes, width, base)
        return place, lanes, blocks

    return places


def _global(i: Instruction, address: str, base: str, width: int) -> Places:
    """Places of a global access: a vector address, or a scalar one and a vector of 32-bit offsets."""
    only(i, "offset", "glc", "slc")
    immediate, first = _offset(i), result(address)
    pair = None if base == "off" else span(base, "s").first // 2
    if pair is None and registers(address).count != 2:
        raise Unsupported(f"the address {address} is not modelled")

    def places(waves: Waves) -> tuple[np.ndarray, np.ndarray, list[Block]]:
        where = waves.v[first].astype(np.int64)
        if pair is None:
            where = where | (waves.v[first + 1].astype(np.int64) << 32)
            known = None
        else:
            known = waves.s64[:, pair].astype(np.int64)
            where = where + known[:, None]
        place, blocks = _memory(waves).inside(waves, where + immediate, waves.lanes, width, known)
        return place, waves.lanes, blocks

    return places


def _load(i: Instruction, places: Places, width: int) -> Operation:
    into = span(i.operands[0], "v")
    if into.count * 4 != max(4, width):
        raise Unsupported(f"{i.operands[0]} as a result of {width} bytes is not modelled")

    cached = "glc" not in i.modifiers

    def run(waves: Waves) -> None:
        place, lanes, blocks = places(waves)
        all_read = waves.full and lanes.all()
        for n, value in enumerate(_memory(waves).load(waves, place, lanes, width, blocks, cached)):
            waves.put(into.first + n, value if all_read else np.where(lanes, value, 0))
        waves.fly(Flight("vmcnt", True, into.numbers, i.text))

    return made(i, run)


def _store(i: Instruction, places: Places, data: str, width: int) -> Operation:
    from_ = span(data, "v")
    if from_.count * 4 != max(4, width):
        raise Unsupported(f"{data} as data of {width} bytes is not modelled")

    def run(waves: Waves) -> None:
        place, lanes, _ = places(waves)
        values = [waves.v[from_.first + n] for n in range(from_.count)]
        _memory(waves).store(waves, place, lanes, values, width)
        first = np.where(lanes, place >> 1, 0)
        cells = np.concatenate([first + n for n in range(width // 2)], axis=1)
        waves.fly(Flight("vmcnt", True, frozenset(), i.text, cells, writes=True))

    return made(i, run, results=0)


_LOADS = ("dword", "dwordx2", "dwordx3", "dwordx4", "ushort")
_STORES = ("dword", "dwordx2", "dwordx3", "dwordx4", "short")


@operation(*(f"buffer_load_{name}" for name in _LOADS))
def _buffer_load(i: Instruction) -> Operation:
    return _load(i, _buffer(i, _width(i)), _width(i))


@operation(*(f"buffer_store_{name}" for name in _STORES))
def _buffer_store(i: Instruction) -> Operation:
    return _store(i, _buffer(i, _width(i)), i.operands[0], _width(i))


@operation(*(f"global_load_{name}" for name in _LOADS))
def _global_load(i: Instruction) -> Operation:
    return _load(i, _global(i, *i.operands[1:], _width(i)), _width(i))


@operation(*(f"global_store_{name}" for name in _STORES))
def _global_store(i: Instruction) -> Operation:
    address, data, base = i.operands
    return _store(i, _global(i, address, base, _width(i)), data, _width(i))


@operation("global_atomic_add")
def _atomic_add(i: Instruction) -> Operation:
    """Lane by lane, in their order. With glc each gets the value from before its addition.

    Our kernels count arrivals so: who adds releases what it has stored before.
    """
    returns = "glc" in i.modifiers
    address, data, base = i.operands[1:] if returns else i.operands
    places, value = _global(i, address, base, 4), result(data)
    into = result(i.operands[0]) if returns else None

    def run(waves: Waves) -> None:
        place, lanes, blocks = places(waves)
        memory, before = _memory(waves), np.zeros((waves.n, LANES), np.uint32)
        memory.release(waves)
        memory.load(waves, place, lanes, 4, blocks, cached=False)
        for wave, lane in np.argwhere(lanes):
            before[wave, lane] = memory.add(int(place[wave, lane]), int(waves.v[value, wave, lane]))
        if returns:
            waves.put(into, before)
        waves.fly(Flight("vmcnt", True, frozenset({into}) if returns else frozenset(), i.text))

    return made(i, run, results=int(returns))


@operation(*(f"s_load_{name}" for name in ("dword", "dwordx2", "dwordx4", "dwordx8", "dwordx16")))
def _scalar_load(i: Instruction) -> Operation:
    only(i, "glc")
    into, pair, width = span(i.operands[0], "s"), span(i.operands[1], "s").first // 2, _width(i)
    offset = constant(i.operands[2], "u32")
    scalar = scalar_source(i.operands[2], False) if offset is None else (lambda waves: offset)
    if into.count * 4 != width:
        raise Unsupported(f"{i.operands[0]} as a result of {width} bytes is not modelled")

    def run(waves: Waves) -> None:
        base = waves.s64[:, pair].astype(np.int64)
        address = base + np.asarray(scalar(waves)).astype(np.int64)
        lanes = np.ones((waves.n, 1), bool)
        place, blocks = _memory(waves).inside(waves, (address & ~3)[:, None], lanes, width, base)
        for n, value in enumerate(_memory(waves).load(waves, place, lanes, width, blocks)):
            waves.s[:, into.first + n] = value[:, 0]
        waves.fly(Flight("lgkmcnt", False, into.numbers, i.text))

    return made(i, run)


@operation("buffer_wbinvl1_vol", "buffer_wbinvl1")
def _invalidate(i: Instruction) -> Operation:
    """Nothing is held in the first cache from here on."""

    def run(waves: Waves) -> None:
        _memory(waves).invalidate(waves)
        waves.fly(Flight("vmcnt", True, frozenset(), i.text))

    return made(i, run, results=0, reads=EXEC_BITS)
