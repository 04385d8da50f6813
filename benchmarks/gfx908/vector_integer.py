"""Vector instructions on integers and bits: 64 lanes of each wave, where EXEC says so.

Semantics: the MI100 ISA guide, "Vector ALU Operations" and the descriptions of VOP2, VOP1, VOPC, VOP3, SDWA and DPP.
What computes 16 bits writes zeros above them (LLVM's GCNSubtarget::zeroesHigh16BitsOfDest for gfx9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.gfx908.assembly import Instruction, registers
from benchmarks.gfx908.faults import Unsupported
from benchmarks.gfx908.operations import (
    DPP,
    EXEC_BITS,
    Operation,
    Source,
    computed,
    made,
    mask_source,
    moved,
    only,
    operation,
    put_mask,
    put_wide,
    result,
    source,
    span,
    wide_source,
)
from benchmarks.gfx908.scalar import reversed_bits
from benchmarks.gfx908.waves import LANES, Waves

_5_BITS, _16_BITS, _24_BITS = np.uint32(31), np.uint32(0xFFFF), np.uint32(0xFFFFFF)


def vector_sources(i: Instruction, dtypes: str | tuple[str, ...], first: int = 1) -> list[Source]:
    """The sources from operand `first` on, with what SDWA and DPP do to them; `dtypes` one for all or one each."""
    texts = i.operands[first:]
    kinds = (dtypes,) * len(texts) if isinstance(dtypes, str) else dtypes
    if i.encoding != "sdwa":
        sources = [source(text, kind) for text, kind in zip(texts, kinds, strict=True)]
        if i.encoding == "dpp":
            sources[0], _ = moved(sources[0], i)
        return sources
    if i.modifiers.get("dst_sel", "DWORD") != "DWORD":
        raise Unsupported("SDWA into a part of a register is not modelled")
    selects = (i.modifiers.get(f"src{n}_sel", "DWORD") for n in range(len(texts)))
    return [source(text, kind, select) for text, kind, select in zip(texts, kinds, selects, strict=False)]


def dpp_needs(i: Instruction, first: int = 1) -> dict[int, Callable[[Waves], np.ndarray]]:
    """What `Operation.needs` says of an instruction with DPP: which lanes of its first source it reads."""
    if i.encoding != "dpp":
        return {}
    number = result(i.operands[first])
    _, needed = moved(source(i.operands[first], "u32"), i)
    own = any(registers(text) == registers(i.operands[first]) for text in i.operands[first + 1 :])
    return {number: (lambda w: needed(w) | w.lanes) if own else needed}


ENCODED = ("dst_sel", "dst_unused", "src0_sel", "src1_sel", *DPP)


def _low24(x: np.ndarray) -> np.ndarray:
    return x & _24_BITS


def _signed24(x: np.ndarray) -> np.ndarray:
    return ((x << np.uint32(8)).view(np.int32) >> np.int32(8)).astype(np.int64)


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a.astype(np.uint64) * b) >> np.uint64(32)).astype(np.uint32)


def _field(a: np.ndarray, offset: np.ndarray, width: np.ndarray) -> np.ndarray:
    return (a >> (offset & _5_BITS)) & ((np.uint32(1) << (width & _5_BITS)) - np.uint32(1))


def _signed_field(a: np.ndarray, offset: np.ndarray, width: np.ndarray) -> np.ndarray:
    up = np.uint32(32) - (width & _5_BITS)  # 32 of no width: then the result is 0
    value = _field(a, offset, width).astype(np.uint64) << up
    return (value.astype(np.uint32).view(np.int32).astype(np.int64) >> up).astype(np.uint32)


def _permuted(high: np.ndarray, low: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each byte of the selector picks one of the eight bytes of {high, low}; 8 to 11 a sign, 12 zeros, above ones."""
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    value = np.zeros(np.broadcast_shapes(both.shape, np.shape(selector)), np.uint32)
    for place in range(4):
        pick = (selector >> np.uint32(8 * place)) & np.uint32(0xFF)
        byte = (both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        if np.any(pick > 7):
            word = 2 * (pick & np.uint32(3)).astype(np.uint64) + np.uint64(1)
            sign = ((both >> (word * np.uint64(8) + np.uint64(7))) & np.uint64(1)) * np.uint64(0xFF)
            byte = np.where(pick <= 7, byte, np.where(pick <= 11, sign, np.where(pick == 12, 0, 0xFF)))
        value |= byte.astype(np.uint32) << np.uint32(8 * place)
    return value


def _shifted_signed(amount: np.ndarray, value: np.ndarray) -> np.ndarray:
    return (value.view(np.int32) >> (amount & _5_BITS).astype(np.int32)).view(np.uint32)


def _as_signed(function: Callable) -> Callable:
    return lambda *operands: function(*(x.view(np.int32) for x in operands)).view(np.uint32)


def _halves(function: Callable) -> Callable:
    """Of the low 16 bits of each operand; zeros above the result's."""
    return lambda *operands: function(*(x & _16_BITS for x in operands)) & _16_BITS


def _extreme3(function: Callable) -> Callable:
    return lambda a, b, c: function(function(a, b), c)


_U32: dict[str, Callable[..., np.ndarray]] = {
    "v_mov_b32": lambda a: a,
    "v_not_b32": lambda a: ~a,
    "v_bfrev_b32": reversed_bits,
    "v_ffbh_u32": lambda a: np.where(a == 0, ~np.uint32(0), np.uint32(31) - _log2(a)),
    "v_add_u32": np.add,
    "v_sub_u32": np.subtract,
    "v_subrev_u32": lambda a, b: b - a,
    "v_and_b32": np.bitwise_and,
    "v_or_b32": np.bitwise_or,
    "v_xor_b32": np.bitwise_xor,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_lshlrev_b32": lambda a, b: b << (a & _5_BITS),
    "v_lshrrev_b32": lambda a, b: b >> (a & _5_BITS),
    "v_ashrrev_i32": _shifted_signed,
    "v_min_u32": np.minimum,
    "v_max_u32": np.maximum,
    "v_min_i32": _as_signed(np.minimum),
    "v_max_i32": _as_signed(np.maximum),
    "v_mul_lo_u32": np.multiply,
    "v_mul_hi_u32": _high_product,
    "v_mul_hi_i32": lambda a, b: (
        (a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64)) >> 32
    ).astype(np.uint32),
    "v_mul_u32_u24": lambda a, b: _low24(a) * _low24(b),
    "v_mul_i32_i24": lambda a, b: (_signed24(a) * _signed24(b)).astype(np.uint32),
    "v_mad_u32_u24": lambda a, b, c: _low24(a) * _low24(b) + c,
    "v_mad_i32_i24": lambda a, b, c: (_signed24(a) * _signed24(b)).astype(np.uint32) + c,
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) << (c & _5_BITS),
    "v_lshl_add_u32": lambda a, b, c: (a << (b & _5_BITS)) + c,
    "v_lshl_or_b32": lambda a, b, c: (a << (b & _5_BITS)) | c,
    "v_and_or_b32": lambda a, b, c: (a & b) | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfi_b32": lambda a, b, c: (a & b) | (~a & c),
    "v_bfe_u32": _field,
    "v_bfe_i32": _signed_field,
    "v_alignbit_b32": lambda a, b, c: (
        ((a.astype(np.uint64) << np.uint64(32)) | b) >> (c & _5_BITS).astype(np.uint64)
    ).astype(np.uint32),
    "v_perm_b32": _permuted,
    "v_min3_i32": _as_signed(_extreme3(np.minimum)),
    "v_max3_i32": _as_signed(_extreme3(np.maximum)),
    "v_min3_u32": _extreme3(np.minimum),
    "v_max3_u32": _extreme3(np.maximum),
    "v_med3_i32": _as_signed(lambda a, b, c: np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))),
    "v_add_u16": _halves(np.add),
    "v_sub_u16": _halves(np.subtract),
    "v_subrev_u16": _halves(lambda a, b: b - a),
    "v_mul_lo_u16": _halves(np.multiply),
    "v_mad_legacy_u16": _halves(lambda a, b, c: a * b + c),
    "v_lshlrev_b16": _halves(lambda a, b: b << (a & np.uint32(15))),
    "v_lshrrev_b16": _halves(lambda a, b: b >> (a & np.uint32(15))),
    "v_ashrrev_i16": _halves(
        lambda a, b: b.astype(np.int16).astype(np.int32) >> (a & np.uint32(15)).astype(np.int32)
    ),
    "v_min_u16": _halves(np.minimum),
    "v_max_u16": _halves(np.maximum),
}


def _log2(a: np.ndarray) -> np.ndarray:
    return np.frexp(a.astype(np.float64))[1].astype(np.uint32) - np.uint32(1)


@operation(*_U32)
def _computed(i: Instruction) -> Operation:
    only(i, *ENCODED)
    function, register, sources = _U32[i.opcode], result(i.operands[0]), vector_sources(i, "u32")
    if len(sources) == 1:
        (a,) = sources
        return computed(i, lambda w: w.put(register, function(a(w))), needs=dpp_needs(i))
    if len(sources) == 2:
        a, b = sources
        return computed(i, lambda w: w.put(register, function(a(w), b(w))), needs=dpp_needs(i))
    a, b, c = sources
    return computed(i, lambda w: w.put(register, function(a(w), b(w), c(w))))


_U64: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "v_lshlrev_b64": lambda a, b: b << (a & np.uint32(63)).astype(np.uint64),
    "v_lshrrev_b64": lambda a, b: b >> (a & np.uint32(63)).astype(np.uint64),
    "v_ashrrev_i64": lambda a, b: (np.asarray(b).view(np.int64) >> (a & np.uint32(63)).astype(np.int64)).view(
        np.uint64
    ),
}


@operation(*_U64)
def _wide_shift(i: Instruction) -> Operation:
    only(i)
    put, function = put_wide(result(i.operands[0])), _U64[i.opcode]
    a, b = source(i.operands[1], "u32"), wide_source(i.operands[2])
    return computed(i, lambda w: put(w, function(a(w), b(w))))


_CARRIES = {  # sign of the second operand, whether operands are swapped
    "v_add_co_u32": (1, False),
    "v_addc_co_u32": (1, False),
    "v_sub_co_u32": (-1, False),
    "v_subb_co_u32": (-1, False),
    "v_subrev_co_u32": (-1, True),
    "v_subbrev_co_u32": (-1, True),
}


@operation(*_CARRIES)
def _with_carry(i: Instruction) -> Operation:
    """Carry or borrow out as a mask; with a fifth operand, in as well."""
    only(i)
    sign, swapped = _CARRIES[i.opcode]
    register, put_carry = result(i.operands[0]), put_mask(i.operands[1])
    a, b = (source(text, "u32") for text in i.operands[2:4])
    if swapped:
        a, b = b, a
    carry_in = mask_source(i.operands[4]) if len(i.operands) == 5 else None

    def run(waves: Waves) -> None:
        exact = a(waves).astype(np.int64) + sign * b(waves).astype(np.int64)
        if carry_in:
            exact = exact + sign * carry_in(waves)
        put_carry(waves, (exact >> 32) != 0)
        waves.put(register, exact.astype(np.uint32))

    return computed(i, run, results=2)


@operation("v_mad_u64_u32")
def _wide_product(i: Instruction) -> Operation:
    only(i)
    put, put_carry = put_wide(result(i.operands[0])), put_mask(i.operands[1])
    a, b, c = source(i.operands[2], "u32"), source(i.operands[3], "u32"), wide_source(i.operands[4])

    def run(waves: Waves) -> None:
        product, addend = a(waves).astype(np.uint64) * b(waves), c(waves)
        total = product + addend
        put_carry(waves, total < product)
        put(waves, np.broadcast_to(total, waves.lanes.shape))

    # Compilers use it for products of 32 bits, with anything in the addend's high half.
    whole = computed(i, run, results=2)
    addend = registers(i.operands[4])
    if addend is None:
        return whole
    high = addend.numbers - {min(addend.numbers)}
    low = result(i.operands[0])
    return replace(whole, depends=whole.depends | {low: whole.reads - high})


COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@operation(*(f"v_cmp_{name}_{t}" for name in (*COMPARISONS, "ne") for t in ("i32", "u32", "u16", "i16")))
def _compare(i: Instruction) -> Operation:
    only(i, *ENCODED)
    name, dtype = i.opcode.split("_")[2:]
    compare = np.not_equal if name == "ne" else COMPARISONS[name]
    put = put_mask(i.operands[0])
    a, b = vector_sources(i, "i32" if dtype == "i32" else "u32")
    if dtype == "u16":
        return made(i, lambda w: put(w, compare(a(w) & _16_BITS, b(w) & _16_BITS)))
    if dtype == "i16":
        return made(i, lambda w: put(w, compare(a(w).astype(np.int16), b(w).astype(np.int16))))
    return made(i, lambda w: put(w, compare(a(w), b(w))))


@operation("v_cmp_eq_u64", "v_cmp_ne_u64", "v_cmp_lt_u64", "v_cmp_gt_u64")
def _compare_wide(i: Instruction) -> Operation:
    only(i)
    name = i.opcode.split("_")[2]
    compare, put = np.not_equal if name == "ne" else COMPARISONS[name], put_mask(i.operands[0])
    a, b = (wide_source(text) for text in i.operands[1:])
    return made(i, lambda w: put(w, compare(a(w), b(w))))


@operation("v_cndmask_b32")
def _select(i: Instruction) -> Operation:
    """The second source in lanes whose bit is set, else the first; only the one that is taken is read."""
    only(i, *ENCODED)
    register, mask = result(i.operands[0]), mask_source(i.operands[3])
    if i.encoding == "sdwa":
        selects = (i.modifiers["src0_sel"], i.modifiers["src1_sel"])
    else:
        selects = ("DWORD", "DWORD")
    a, b = (source(text, "u32", select) for text, select in zip(i.operands[1:3], selects, strict=True))
    first, second = (registers(text.strip("-|")) for text in i.operands[1:3])
    needs = {}
    if first and first.kind == "v" and first != second:
        needs[first.first] = lambda w: w.lanes & ~mask(w)
    if second and second.kind == "v" and first != second:
        needs[second.first] = lambda w: w.lanes & mask(w)
    return computed(i, lambda w: w.put(register, np.where(mask(w), b(w), a(w))), needs=needs)


def _one_lane(lane: Callable[[Waves], np.ndarray]) -> Callable[[Waves], np.ndarray]:
    """-> bool [waves, 64], one lane of each wave."""
    return lambda w: np.arange(LANES) == np.broadcast_to(lane(w), w.n)[:, None]


def _lane_number(text: str) -> Callable[[Waves], np.ndarray]:
    read = source(text, "u32")
    return lambda w: np.broadcast_to(np.atleast_1d(np.squeeze(read(w) & np.uint32(63))), w.n)


@operation("v_readfirstlane_b32")
def _read_first_lane(i: Instruction) -> Operation:
    """The first active lane; lane 0 where none is."""
    return _reads_lane(i, lambda w: np.argmax(w.lanes, axis=1))


@operation("v_readlane_b32")
def _read_lane(i: Instruction) -> Operation:
    return _reads_lane(i, _lane_number(i.operands[2]))


def _reads_lane(i: Instruction, lane: Callable[[Waves], np.ndarray]) -> Operation:
    only(i)
    number, vector = span(i.operands[0], "s").first, result(i.operands[1])

    def run(waves: Waves) -> None:
        waves.s[:, number] = waves.v[vector, np.arange(waves.n), lane(waves)]

    return made(i, run, needs={vector: _one_lane(lane)}, reads=EXEC_BITS)


@operation("v_writelane_b32")
def _write_lane(i: Instruction) -> Operation:
    """One lane, active or not; the others stay as they are."""
    only(i)
    vector, lane = result(i.operands[0]), _lane_number(i.operands[2])
    value = source(i.operands[1], "u32")

    def run(waves: Waves) -> None:
        waves.v[vector, np.arange(waves.n), lane(waves)] = np.broadcast_to(value(waves), (waves.n, 1))[:, 0]

    return made(i, run, lanes=_one_lane(lane))


@operation("v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32")
def _count_lower_lanes(i: Instruction) -> Operation:
    """Bits of a mask below the own lane, plus the second source; "hi" takes the mask of lanes 32 to 63."""
    only(i)
    register, (mask, addend) = result(i.operands[0]), vector_sources(i, "u32")
    below = (np.uint64(1) << np.arange(LANES, dtype=np.uint64)) - np.uint64(1)
    own = (below >> np.uint64(32 if "hi" in i.opcode else 0)).astype(np.uint32)

    def run(waves: Waves) -> None:
        waves.put(register, np.bitwise_count(mask(waves) & own) + addend(waves))

    return made(i, run)
