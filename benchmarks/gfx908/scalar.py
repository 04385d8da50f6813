"""Scalar instructions: one value for each wave.

Semantics: the MI100 ISA guide, "Scalar ALU Operations" and the descriptions of SOP2, SOPK, SOP1 and SOPC. SCC is set as
written there: signed overflow of additions of i32, carry of u32, otherwise "the result is not zero".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.gfx908.assembly import EXEC, Instruction, registers
from benchmarks.gfx908.faults import Unsupported
from benchmarks.gfx908.operations import EXEC_BITS, Operation, constant, made, operation, span
from benchmarks.gfx908.waves import Waves

Value = np.ndarray  # [waves], uint32 or uint64
Read = Callable[[Waves], Value]


def scalar_source(text: str, wide: bool) -> Read:
    """Reads uint32 or (wide) uint64 [waves], or a scalar of that type."""
    bits = constant(text, "u64" if wide else "u32")
    if bits is not None:
        value = np.uint64(bits) if wide else np.uint32(bits)
        return lambda waves: value
    number = span(text, "s").first
    if registers(text).count != (2 if wide else 1):
        raise Unsupported(f"the operand {text} is not modelled")
    if wide:
        return lambda waves: waves.s64[:, number // 2]
    return lambda waves: waves.s[:, number]


def scalar_result(text: str, wide: bool) -> Callable[[Waves, Value], None]:
    """Writes [waves]."""
    number = span(text, "s").first
    if registers(text).count != (2 if wide else 1):
        raise Unsupported(f"the result {text} is not modelled")
    if number == EXEC and wide:
        return Waves.set_exec
    if number in (EXEC, EXEC + 1):
        raise Unsupported("half of EXEC as a result is not modelled")

    def put(waves: Waves, value: Value) -> None:
        (waves.s64 if wide else waves.s)[:, number // 2 if wide else number] = value

    return put


def _signed(value: Value) -> np.ndarray:
    return np.asarray(value).astype(np.int64) - ((np.asarray(value).astype(np.int64) >> 31) << 32)


def _overflows(exact: np.ndarray) -> np.ndarray:
    return (exact < -(2**31)) | (exact >= 2**31)


def _low(exact: np.ndarray) -> Value:
    return (exact & 0xFFFFFFFF).astype(np.uint32)


def _add_signed(waves: Waves, a: Value, b: Value) -> Value:
    exact = _signed(a) + _signed(b)
    waves.scc[:] = _overflows(exact)
    return _low(exact)


def _subtract_signed(waves: Waves, a: Value, b: Value) -> Value:
    exact = _signed(a) - _signed(b)
    waves.scc[:] = _overflows(exact)
    return _low(exact)


def _sum(carry_in: bool, sign: int) -> Callable[[Waves, Value, Value], Value]:
    """Unsigned addition (sign 1) or subtraction (-1), SCC being carry or borrow."""

    def run(waves: Waves, a: Value, b: Value) -> Value:
        exact = np.asarray(a).astype(np.int64) + sign * np.asarray(b).astype(np.int64)
        if carry_in:
            exact = exact + sign * waves.scc
        waves.scc[:] = (exact >> 32) != 0
        return _low(exact)

    return run


def _shift_add(shift: int) -> Callable[[Waves, Value, Value], Value]:
    """(a << shift) + b; SCC: it needs more than 32 bits."""

    def run(waves: Waves, a: Value, b: Value) -> Value:
        exact = (np.asarray(a).astype(np.int64) << shift) + b
        waves.scc[:] = (exact >> 32) != 0
        return _low(exact)

    return run


def _tested(function: Callable[[Value, Value], Value]) -> Callable[[Waves, Value, Value], Value]:
    """SCC: the result is not zero."""

    def run(waves: Waves, a: Value, b: Value) -> Value:
        value = function(a, b)
        waves.scc[:] = value != 0
        return value

    return run


def _untested(function: Callable[[Value, Value], Value]) -> Callable[[Waves, Value, Value], Value]:
    return lambda waves, a, b: function(a, b)


def _chosen(signed: bool, least: bool) -> Callable[[Waves, Value, Value], Value]:
    """The smaller or the larger; SCC: it is the first."""

    def run(waves: Waves, a: Value, b: Value) -> Value:
        x, y = (_signed(a), _signed(b)) if signed else (a, b)
        waves.scc[:] = first = x < y if least else x > y
        return np.where(first, a, b)

    return run


def _bit_field(signed: bool) -> Callable[[Value, Value], Value]:
    """Offset in bits 4:0 of the second operand, width in bits 22:16."""

    def run(a: Value, b: Value) -> Value:
        offset, width = np.asarray(b).astype(np.int64) & 31, (np.asarray(b).astype(np.int64) >> 16) & 127
        value = (_signed(a) if signed else np.asarray(a).astype(np.int64)) >> offset
        kept = np.minimum(width, 32)
        value = value & ((np.int64(1) << kept) - 1)
        if signed:
            top = (value >> np.maximum(kept - 1, 0)) & 1
            value = np.where(kept > 0, value - (top << kept), 0)
        return _low(value)

    return run


def _high_product(a: Value, b: Value, signed: bool) -> Value:
    x, y = (_signed(a), _signed(b)) if signed else (np.asarray(a).astype(np.uint64), np.asarray(b, np.uint64))
    return _low((x * y) >> (np.int64(32) if signed else np.uint64(32)))


def _shift_right_signed(a: Value, b: Value) -> Value:
    return _low(_signed(a) >> (np.asarray(b).astype(np.int64) & 31))


_SOP2: dict[str, Callable[[Waves, Value, Value], Value]] = {
    "s_add_i32": _add_signed,
    "s_sub_i32": _subtract_signed,
    "s_add_u32": _sum(False, 1),
    "s_addc_u32": _sum(True, 1),
    "s_sub_u32": _sum(False, -1),
    "s_subb_u32": _sum(True, -1),
    **{f"s_lshl{n}_add_u32": _shift_add(n) for n in (1, 2, 3, 4)},
    "s_mul_i32": _untested(lambda a, b: np.multiply(a, b, dtype=np.uint32)),
    "s_mul_hi_u32": _untested(lambda a, b: _high_product(a, b, signed=False)),
    "s_mul_hi_i32": _untested(lambda a, b: _high_product(a, b, signed=True)),
    "s_min_i32": _chosen(signed=True, least=True),
    "s_max_i32": _chosen(signed=True, least=False),
    "s_min_u32": _chosen(signed=False, least=True),
    "s_max_u32": _chosen(signed=False, least=False),
    "s_lshl_b32": _tested(lambda a, b: a << (b & np.uint32(31))),
    "s_lshr_b32": _tested(lambda a, b: a >> (b & np.uint32(31))),
    "s_ashr_i32": _tested(_shift_right_signed),
    "s_bfe_u32": _tested(_bit_field(signed=False)),
    "s_bfe_i32": _tested(_bit_field(signed=True)),
}
_LOGIC: dict[str, Callable[[Value, Value], Value]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
_SOP2_64 = {f"s_{name}_b64": _tested(function) for name, function in _LOGIC.items()}
_SOP2 |= {f"s_{name}_b32": _tested(function) for name, function in _LOGIC.items()}


@operation(*_SOP2, *_SOP2_64)
def _two_operands(i: Instruction) -> Operation:
    wide = i.opcode in _SOP2_64
    function = (_SOP2_64 if wide else _SOP2)[i.opcode]
    put = scalar_result(i.operands[0], wide)
    a, b = (scalar_source(text, wide) for text in i.operands[1:])
    return made(i, lambda waves: put(waves, function(waves, a(waves), b(waves))))


@operation("s_lshl_b64", "s_lshr_b64")
def _wide_shift(i: Instruction) -> Operation:
    put, a, b = (
        scalar_result(i.operands[0], True),
        scalar_source(i.operands[1], True),
        scalar_source(i.operands[2], False),
    )
    shift = np.left_shift if i.opcode == "s_lshl_b64" else np.right_shift

    def run(waves: Waves) -> None:
        value = shift(a(waves), np.asarray(b(waves)).astype(np.uint64) & np.uint64(63))
        waves.scc[:] = value != 0
        put(waves, value)

    return made(i, run)


@operation("s_cselect_b32", "s_cselect_b64")
def _select(i: Instruction) -> Operation:
    wide = i.opcode.endswith("b64")
    put = scalar_result(i.operands[0], wide)
    a, b = (scalar_source(text, wide) for text in i.operands[1:])
    return made(i, lambda waves: put(waves, np.where(waves.scc, a(waves), b(waves))))


def _immediate(text: str, signed: bool = True) -> np.uint32:
    """SOPK's 16 bits, extended to 32."""
    value = constant(text, "u32")
    if value is None:
        raise Unsupported(f"{text} is no immediate value")
    value &= 0xFFFF
    return np.uint32(value - 0x10000 & 0xFFFFFFFF if signed and value >> 15 else value)


@operation("s_movk_i32")
def _move_immediate(i: Instruction) -> Operation:
    put, value = scalar_result(i.operands[0], False), _immediate(i.operands[1])
    return made(i, lambda waves: put(waves, value))


@operation("s_addk_i32", "s_mulk_i32")
def _with_immediate(i: Instruction) -> Operation:
    put, a = scalar_result(i.operands[0], False), scalar_source(i.operands[0], False)
    value = _immediate(i.operands[1])
    function = _SOP2["s_add_i32" if i.opcode == "s_addk_i32" else "s_mul_i32"]
    return made(
        i,
        lambda waves: put(waves, function(waves, a(waves), value)),
        reads=registers(i.operands[0]).numbers,
    )


_COMPARISONS = {
    "eq": np.equal,
    "lg": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
}


@operation(*(f"s_cmp{k}_{name}_{t}" for k in ("", "k") for name in _COMPARISONS for t in ("i32", "u32")))
def _compare(i: Instruction) -> Operation:
    _, comparison, name, dtype = i.opcode.split("_")
    compare, signed = _COMPARISONS[name], dtype == "i32"
    a, b = scalar_source(i.operands[0], False), None
    if comparison == "cmpk":
        value = _immediate(i.operands[1], signed)
        b = lambda waves: value  # noqa: E731
    else:
        b = scalar_source(i.operands[1], False)

    def run(waves: Waves) -> None:
        x, y = a(waves), b(waves)
        waves.scc[:] = compare(_signed(x), _signed(y)) if signed else compare(x, y)

    return made(i, run, results=0)


@operation("s_cmp_eq_u64", "s_cmp_lg_u64")
def _compare_wide(i: Instruction) -> Operation:
    a, b = (scalar_source(text, True) for text in i.operands)
    compare = _COMPARISONS[i.opcode.split("_")[2]]

    def run(waves: Waves) -> None:
        waves.scc[:] = compare(a(waves), b(waves))

    return made(i, run, results=0)


@operation("s_bitcmp0_b32", "s_bitcmp1_b32")
def _test_bit(i: Instruction) -> Operation:
    a, b = (scalar_source(text, False) for text in i.operands)
    wanted = int(i.opcode[len("s_bitcmp")])

    def run(waves: Waves) -> None:
        waves.scc[:] = ((a(waves) >> (b(waves) & np.uint32(31))) & np.uint32(1)) == wanted

    return made(i, run, results=0)


@operation("s_mov_b32", "s_mov_b64")
def _move(i: Instruction) -> Operation:
    wide = i.opcode == "s_mov_b64"
    put, a = scalar_result(i.operands[0], wide), scalar_source(i.operands[1], wide)
    return made(i, lambda waves: put(waves, np.array(a(waves))))


@operation("s_not_b32", "s_not_b64", "s_abs_i32", "s_bcnt1_i32_b64", "s_bcnt1_i32_b32", "s_brev_b32")
def _one_operand(i: Instruction) -> Operation:
    wide_in, wide_out = i.opcode.endswith("b64"), i.opcode == "s_not_b64"
    put, a = scalar_result(i.operands[0], wide_out), scalar_source(i.operands[1], wide_in)
    function = {
        "s_not": lambda x: ~x,
        "s_abs": lambda x: _low(np.abs(_signed(x))),
        "s_bcnt1": lambda x: np.bitwise_count(x).astype(np.uint32),
        "s_brev": reversed_bits,
    }["_".join(i.opcode.split("_")[:2])]

    def run(waves: Waves) -> None:
        value = function(a(waves))
        if i.opcode != "s_brev_b32":
            waves.scc[:] = value != 0
        put(waves, value)

    return made(i, run)


def reversed_bits(x: np.ndarray) -> np.ndarray:
    """uint32 with bit 0 where bit 31 was, and so on."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        x = ((x >> np.uint32(shift)) & np.uint32(mask)) | ((x & np.uint32(mask)) << np.uint32(shift))
    return x


@operation("s_bitset0_b32", "s_bitset1_b32")
def _set_bit(i: Instruction) -> Operation:
    put, old = scalar_result(i.operands[0], False), scalar_source(i.operands[0], False)
    index, one = scalar_source(i.operands[1], False), i.opcode == "s_bitset1_b32"

    def run(waves: Waves) -> None:
        bit = np.uint32(1) << (index(waves) & np.uint32(31))
        put(waves, old(waves) | bit if one else old(waves) & ~bit)

    return made(i, run, reads=registers(i.operands[0]).numbers)


@operation(*(f"s_{name}_saveexec_b64" for name in ("and", "or", "xor", "andn2", "orn2")))
def _save_exec(i: Instruction) -> Operation:
    """The result is EXEC as it was; then EXEC is the operand combined with it. SCC: a lane is left."""
    put, a = scalar_result(i.operands[0], True), scalar_source(i.operands[1], True)
    function = _LOGIC[i.opcode.split("_")[1]]

    def run(waves: Waves) -> None:
        old, new = waves.exec.copy(), a(waves)
        new = function(new, old)
        put(waves, old)
        waves.set_exec(new)
        waves.scc[:] = new != 0

    return made(i, run, reads=EXEC_BITS, writes=EXEC_BITS)
