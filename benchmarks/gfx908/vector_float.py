"""Vector instructions on floating-point numbers, in the mode in which our kernels run: round to nearest even, denormals
kept in all types, IEEE mode on (`assembly.py` refuses any other).

Semantics: the MI100 ISA guide, "Vector ALU Operations" and the descriptions of VOP2, VOP1, VOPC, VOP3 and VOP3P.
Transcendental functions are an ulp off on the hardware; here they are the nearest float32. LLVM relies on none of their
denormal operands and results (AMDGPUCodeGenPrepare: v_rcp_f32 and v_rsq_f32 do not support denormals): here they are
zero. v_div_scale_f32 and its two companions are as in the guide, but where a division would come out wrong by that:
v_div_fmas_f32 scales back by 2**64, which is what v_div_scale_f32 applied, v_div_scale_f32 does not scale a denominator
beyond 2**126 further up, and v_div_fixup_f32 takes a quotient that is no number for an overflow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.gfx908.assembly import Instruction, registers
from benchmarks.gfx908.faults import Unsupported
from benchmarks.gfx908.operations import (
    VCC_BITS,
    Operation,
    Source,
    bare,
    computed,
    constant,
    made,
    mask_source,
    only,
    operation,
    put_mask,
    result,
    source,
)
from benchmarks.gfx908.vector_integer import COMPARISONS, ENCODED, dpp_needs, vector_sources
from benchmarks.gfx908.waves import Waves

_LEAST_NORMAL = 2.0**-126
_16_BITS, _HIGH = np.uint32(0xFFFF), np.uint32(16)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once.

    The product is exact in float64. Where the sum is not, and lies so close to the middle of two float32 that rounding
    it twice could go wrong (or is denormal, where the middle lies elsewhere), it is rounded to odd first.
    """
    product = a.astype(np.float64) * b
    total = np.asarray(product + c)
    middle = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if (middle | (np.abs(total) < _LEAST_NORMAL)).any():
        rest = total - product
        error = (product - (total - rest)) + (c - rest)
        even = (total.view(np.uint64) & np.uint64(1)) == 0
        total = np.where(
            even & (error != 0) & np.isfinite(total), np.nextafter(total, np.copysign(np.inf, error)), total
        )
    return total.astype(np.float32)


def _extreme(function: Callable, of_zeros: Callable) -> Callable:
    """Maximum or minimum: of a number and a NaN the number; a signalling NaN becomes the (quiet) result."""

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        value = function(a, b)
        if not value.all():
            bits = of_zeros(a.view(np.uint32), b.view(np.uint32)).view(np.float32)
            value = np.where((a == 0) & (b == 0), bits, value)
        nan = np.isnan(a), np.isnan(b)
        if nan[0].any() or nan[1].any():
            for x, is_nan in zip((b, a), nan[::-1], strict=True):  # the first operand's wins
                bits = x.view(np.uint32)
                quiet = (bits | np.uint32(0x400000)).view(np.float32)
                value = np.where(is_nan & ((bits & np.uint32(0x400000)) == 0), quiet, value)
        return value

    return run


maximum = _extreme(np.fmax, np.bitwise_and)
minimum = _extreme(np.fmin, np.bitwise_or)


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < _LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def _transcendental(function: Callable) -> Callable:
    return lambda a: _flushed(function(_flushed(a).astype(np.float64)).astype(np.float32))


def ldexp(a: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """a * 2**exponent, rounded once."""
    return np.ldexp(a.astype(np.float64), np.clip(exponent, -400, 400)).astype(np.float32)


_F32: dict[str, Callable[..., np.ndarray]] = {
    "v_add_f32": np.add,
    "v_sub_f32": np.subtract,
    "v_subrev_f32": lambda a, b: b - a,
    "v_mul_f32": np.multiply,
    "v_max_f32": maximum,
    "v_min_f32": minimum,
    "v_fma_f32": fma,
    "v_max3_f32": lambda a, b, c: maximum(maximum(a, b), c),
    "v_min3_f32": lambda a, b, c: minimum(minimum(a, b), c),
    "v_rcp_f32": _transcendental(lambda x: 1 / x),
    "v_rcp_iflag_f32": _transcendental(lambda x: 1 / x),
    "v_rsq_f32": _transcendental(lambda x: 1 / np.sqrt(x)),
    "v_sqrt_f32": _transcendental(np.sqrt),
    "v_exp_f32": _transcendental(np.exp2),
    "v_log_f32": _transcendental(np.log2),
    "v_rndne_f32": np.rint,
    "v_floor_f32": np.floor,
    "v_trunc_f32": np.trunc,
}


@operation(*_F32)
def _computed(i: Instruction) -> Operation:
    only(i, *ENCODED)
    function, register, sources = _F32[i.opcode], result(i.operands[0]), vector_sources(i, "f32")
    if len(sources) == 1:
        (a,) = sources
        return computed(i, lambda w: w.put_float(register, function(a(w))), needs=dpp_needs(i))
    if len(sources) == 2:
        a, b = sources
        return computed(i, lambda w: w.put_float(register, function(a(w), b(w))), needs=dpp_needs(i))
    a, b, c = sources
    return computed(i, lambda w: w.put_float(register, function(a(w), b(w), c(w))))


@operation("v_fmac_f32")
def _accumulated(i: Instruction) -> Operation:
    only(i)
    register, (a, b) = result(i.operands[0]), vector_sources(i, "f32")
    run = lambda w: w.put_float(register, fma(a(w), b(w), w.vf[register]))  # noqa: E731
    return computed(i, run, reads=registers(i.operands[0]).numbers)


@operation("v_ldexp_f32")
def _scaled(i: Instruction) -> Operation:
    only(i)
    register, a, exponent = result(i.operands[0]), source(i.operands[1], "f32"), source(i.operands[2], "i32")
    return computed(i, lambda w: w.put_float(register, ldexp(a(w), exponent(w))))


def half(bits: np.ndarray) -> np.ndarray:
    """The low 16 bits of uint32 as float16."""
    return bits.astype(np.uint16).view(np.float16)


@operation("v_cvt_f32_f16")
def _widened(i: Instruction) -> Operation:
    only(i, *ENCODED)
    register, (a,) = result(i.operands[0]), vector_sources(i, "u32")
    return computed(i, lambda w: w.put_float(register, half(a(w)).astype(np.float32)))


@operation("v_cvt_f16_f32")
def _narrowed(i: Instruction) -> Operation:
    only(i)
    register, (a,) = result(i.operands[0]), vector_sources(i, "f32")
    return computed(i, lambda w: w.put(register, a(w).astype(np.float16).view(np.uint16)))


@operation("v_pack_b32_f16")
def _packed(i: Instruction) -> Operation:
    only(i)
    if any(text.startswith("-") or "|" in text for text in i.operands):
        raise Unsupported("signs of halves are not modelled")
    register, (a, b) = result(i.operands[0]), [_half_source(text) for text in i.operands[1:]]
    return computed(i, lambda w: w.put(register, (a(w) & _16_BITS) | (b(w) << _HIGH)))


def _half_source(text: str) -> Source:
    bits = constant(text, "f16")
    if bits is None:
        return source(text, "u32")
    value = np.uint32(bits)
    return lambda waves: value


def _bits_of_list(i: Instruction, name: str) -> list[int]:
    text = i.modifiers.get(name, "[0,0,0]")
    return [int(digit) for digit in text.strip("[]").split(",")]


@operation("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16")
def _mixed(i: Instruction) -> Operation:
    """An FMA in float32 of float32 and float16 sources. op_sel_hi: the source is a half; op_sel: it is the high one.

    The f16 forms round the float32 result, and leave the register's other half as it is.
    """
    only(i, "op_sel", "op_sel_hi")
    high, halves = _bits_of_list(i, "op_sel"), _bits_of_list(i, "op_sel_hi")
    register = result(i.operands[0])
    a, b, c = (
        _mixed_source(text, is_half, is_high)
        for text, is_half, is_high in zip(i.operands[1:], halves, high, strict=True)
    )
    if i.opcode == "v_fma_mix_f32":
        return computed(i, lambda w: w.put_float(register, fma(a(w), b(w), c(w))))
    shift = np.uint32(16 if i.opcode == "v_fma_mixhi_f16" else 0)
    kept = np.uint32(0xFFFF) if shift else np.uint32(0xFFFF0000)

    def run(waves: Waves) -> None:
        value = fma(a(waves), b(waves), c(waves)).astype(np.float16).view(np.uint16)
        waves.put(register, (waves.v[register] & kept) | (value.astype(np.uint32) << shift))

    return computed(i, run)


def _mixed_source(text: str, is_half: int, is_high: int) -> Source:
    if not is_half:
        if is_high:
            raise Unsupported("op_sel of a float32 source is not modelled")
        return source(text, "f32")
    bits = constant(text, "f16")
    if bits is not None:
        if is_high:
            raise Unsupported(f"the high half of {text} is not modelled")
        value = half(np.array(bits, np.uint32)).astype(np.float32)[()]
        return lambda waves: value
    read = source(bare(text), "u32", "WORD_1" if is_high else "WORD_0")
    if "|" in text:
        raise Unsupported("the magnitude of a half is not modelled")
    if text.startswith("-"):
        return lambda waves: -half(read(waves)).astype(np.float32)
    return lambda waves: half(read(waves)).astype(np.float32)


def _truncated(low: float, high: float, dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    def run(a: np.ndarray) -> np.ndarray:
        value = np.clip(np.trunc(a.astype(np.float64)), low, high)
        return np.where(np.isnan(value), 0, value).astype(np.int64).astype(dtype)

    return run


_CONVERSIONS: dict[str, tuple[str, Callable]] = {
    "v_cvt_u32_f32": ("f32", _truncated(0, 2.0**32 - 1, np.uint32)),
    "v_cvt_i32_f32": ("f32", lambda a: _truncated(-(2.0**31), 2.0**31 - 1, np.int32)(a).view(np.uint32)),
    "v_cvt_f32_u32": ("u32", lambda a: a.astype(np.float32).view(np.uint32)),
    "v_cvt_f32_i32": ("i32", lambda a: a.astype(np.float32).view(np.uint32)),
}


@operation(*_CONVERSIONS)
def _converted(i: Instruction) -> Operation:
    only(i)
    dtype, function = _CONVERSIONS[i.opcode]
    register, (a,) = result(i.operands[0]), vector_sources(i, dtype)
    return computed(i, lambda w: w.put(register, function(a(w))))


_FLOAT_COMPARISONS = {
    **COMPARISONS,
    "lg": lambda a, b: (a < b) | (a > b),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
}


@operation(*(f"v_cmp_{name}_f32" for name in _FLOAT_COMPARISONS))
def _compare(i: Instruction) -> Operation:
    only(i)
    compare, put = _FLOAT_COMPARISONS[i.opcode.split("_")[2]], put_mask(i.operands[0])
    a, b = vector_sources(i, "f32")
    return made(i, lambda w: put(w, compare(a(w), b(w))))


def _exponent(x: np.ndarray) -> np.ndarray:
    return ((x.view(np.uint32) >> np.uint32(23)) & np.uint32(0xFF)).astype(np.int32)


def _is_denormal(x: np.ndarray) -> np.ndarray:
    return (x != 0) & (np.abs(x) < _LEAST_NORMAL)


@operation("v_div_scale_f32")
def _division_scaled(i: Instruction) -> Operation:
    """Numerator or denominator (the first source, which equals one of the others) scaled so that the steps between
    neither overflow nor lose bits; the mask says that v_div_fmas_f32 has to scale back.
    """
    only(i)
    register, put = result(i.operands[0]), put_mask(i.operands[1])
    sources = [source(text, "f32") for text in i.operands[2:]]

    def run(waves: Waves) -> None:
        s0, s1, s2 = (np.broadcast_to(read(waves), waves.lanes.shape) for read in sources)
        up, down = ldexp(s0, np.int32(64)), ldexp(s0, np.int32(-64))
        wide1, wide2 = s1.astype(np.float64), s2.astype(np.float64)
        inverse_small = np.abs(1 / wide1) < _LEAST_NORMAL
        ratio_small = (np.abs(wide2 / wide1) < _LEAST_NORMAL) & (s2 != 0)
        cases = [
            (s1 == 0) | (s2 == 0),
            _exponent(s2) - _exponent(s1) >= 96,
            _is_denormal(s1),
            inverse_small & ratio_small,
            inverse_small,
            ratio_small,
            _exponent(s2) <= 23,
        ]
        is_denominator = s0.view(np.uint32) == s1.view(np.uint32)
        is_numerator = s0.view(np.uint32) == s2.view(np.uint32)
        scaled_denominator, scaled_numerator = (
            np.where(is_denominator, up, s0),
            np.where(is_numerator, up, s0),
        )
        lowered_denominator = np.where(is_denominator, down, s0)
        nan = np.full_like(s0, np.nan)
        values = [nan, scaled_denominator, up, lowered_denominator, down, scaled_numerator, up]
        waves.put_float(register, np.select(cases, values, s0))
        nowhere = np.zeros_like(ratio_small)
        flags = [nowhere, ~nowhere, nowhere, ~nowhere, nowhere, ~nowhere]
        put(waves, np.select(cases[:6], flags, False))

    return computed(i, run, results=2)


@operation("v_div_fmas_f32")
def _division_step(i: Instruction) -> Operation:
    """An FMA, scaled back where VCC says so: up where the denominator had been scaled (a huge quotient), else down."""
    only(i)
    register, scaled = result(i.operands[0]), mask_source("vcc")
    a, b, c = vector_sources(i, "f32")

    def run(waves: Waves) -> None:
        x, y, z = (np.broadcast_to(read(waves), waves.lanes.shape) for read in (a, b, c))
        value, mask = fma(x, y, z), scaled(waves)
        if mask.any():
            exact = np.where(_exponent(z) > 127, 64, -64)
            value = np.where(mask, ldexp(value, exact), value)
        waves.put_float(register, value)

    return computed(i, run, reads=VCC_BITS)


@operation("v_div_fixup_f32")
def _division_fixed(i: Instruction) -> Operation:
    """The quotient (first source) of numerator (third) and denominator (second), special cases put right."""
    only(i)
    register, (quotient, denominator, numerator) = result(i.operands[0]), vector_sources(i, "f32")

    def run(waves: Waves) -> None:
        s0, s1, s2 = (
            np.broadcast_to(r(waves), waves.lanes.shape) for r in (quotient, denominator, numerator)
        )
        sign = np.where(np.signbit(s1) != np.signbit(s2), np.float32(-1), np.float32(1))
        quiet = [(x.view(np.uint32) | np.uint32(0x400000)).view(np.float32) for x in (s2, s1)]
        invalid = ((s1 == 0) & (s2 == 0)) | (np.isinf(s1) & np.isinf(s2))
        nan = np.broadcast_to(np.array(0xFFC00000, np.uint32).view(np.float32), s0.shape)
        cases = [
            np.isnan(s2),
            np.isnan(s1),
            invalid,
            (s1 == 0) | np.isinf(s2),
            np.isinf(s1) | (s2 == 0),
            _exponent(s2) - _exponent(s1) < -150,
            np.isnan(s0),  # the steps before have overflown
        ]
        underflow, overflow = sign * np.float32(0), sign * np.float32(np.inf)
        values = [*quiet, nan, overflow, underflow, underflow, overflow]
        waves.put_float(register, np.select(cases, values, np.copysign(s0, sign)))

    return computed(i, run)
