"""Floating-point instructions: rounding against exact fractions, denormals, NaN, signed zeros, and whole divisions."""

from fractions import Fraction

import numpy as np
import pytest
from gfx908_snippets import VCC, execute, floats, words

LEAST = float(np.float32(2**-149))  # the smallest denormal
LARGEST = float(np.finfo(np.float32).max)
EDGES = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1 + 2**-23,
    LEAST,
    -3 * LEAST,
    2.0**-126,
    LARGEST,
    -LARGEST,
    np.inf,
    -np.inf,
    np.nan,
)


def nearest(exact: Fraction) -> np.float32:
    """An exact value rounded to the nearest float32, ties to even."""
    if exact == 0:
        return np.float32(0)
    magnitude, exponent = abs(exact), 0
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 24, -149)
    while magnitude / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    while exponent > -149 and magnitude / Fraction(2) ** exponent < 2**23:
        exponent -= 1
    value = round(magnitude / Fraction(2) ** exponent) * 2.0**exponent  # Python rounds ties to even
    with np.errstate(over="ignore"):
        return np.float32(value if exact > 0 else -value)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Bit for bit, but for what is in a NaN."""
    both_nan = np.isnan(found) & np.isnan(wanted)
    return bool(((found.view(np.uint32) == wanted.view(np.uint32)) | both_nan).all())


def test_a_fused_multiply_add_is_rounded_once():
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal((3, 64, 8)) * 2.0 ** generator.integers(-30, 30, (3, 64, 8))).astype(
        np.float32
    )
    # In float64 these sums end in the middle of two float32, and only what float64 drops tells which is nearer.
    a[:, 0], b[:, 0], c[:, 0] = 1 + 2**-23, 1 + 2**-23, 0
    a[0, 1], b[0, 1], c[0, 1] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60
    a[1, 1], b[1, 1], c[1, 1] = 1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60)
    a[2, 1], b[2, 1], c[2, 1] = 2.0**-75, 2.0**-75, 2.0**-126  # half of the least denormal
    a[3, 1], b[3, 1], c[3, 1] = 2.0**-75, 1.5 * 2.0**-75, 2.0**-149
    state = execute(
        "v_fma_f32 v3, v0, v1, v2\nv_fmac_f32_e32 v4, v0, v1", v={0: a.T, 1: b.T, 2: c.T, 4: c.T}, waves=8
    )
    exact = np.vectorize(
        lambda x, y, z: nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
    )
    wanted = exact(a, b, c).astype(np.float32).T
    assert same(state.vf[3], wanted)
    assert same(state.vf[4], wanted)


def test_a_fused_multiply_add_of_edges():
    triples = [(x, y, z) for x in EDGES for y in EDGES for z in EDGES[::3]]
    a, b, c = (np.array(x, np.float32) for x in zip(*triples, strict=True))
    pad = -len(a) % 64
    a, b, c = (np.pad(x, (0, pad)).reshape(-1, 64) for x in (a, b, c))
    state = execute("v_fma_f32 v3, v0, v1, v2", v={0: a, 1: b, 2: c}, waves=len(a))
    with np.errstate(all="ignore"):
        wanted = (a.astype(np.longdouble) * b + c).astype(np.float32)
    assert same(state.vf[3], wanted)


@pytest.mark.parametrize(
    ("opcode", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)]
)
def test_arithmetic_keeps_denormals(opcode, function):
    pairs = [(x, y) for x in EDGES for y in EDGES]
    a, b = (np.resize(np.array(x, np.float32), (3, 64)) for x in zip(*pairs, strict=True))
    state = execute(f"v_{opcode}_f32_e32 v2, v0, v1", v={0: a, 1: b}, waves=3)
    with np.errstate(all="ignore"):
        assert same(state.vf[2], function(a, b))
    assert float(execute("v_mul_f32_e32 v1, 0.5, v0", v={0: floats(2.0**-148)}).vf[1, 0, 0]) == LEAST


def test_maximum_and_minimum_prefer_numbers_and_know_signs_of_zeros():
    signalling = 0x7F800001
    a = words(
        *np.array([1, np.nan, np.nan, 0.0, -0.0, -0.0], np.float32).view(np.uint32).tolist(), signalling
    )
    b = words(
        *np.array([np.nan, 2, np.nan, -0.0, 0.0, -0.0], np.float32).view(np.uint32).tolist(), 0x3F800000
    )
    state = execute(
        "v_max_f32_e32 v2, v0, v1\nv_min_f32_e32 v3, v0, v1\nv_max3_f32 v4, v0, v1, v0", v={0: a, 1: b}
    )
    largest, smallest = state.vf[2, 0, :7], state.vf[3, 0, :7]
    assert list(largest[:2]) == [1, 2] and np.isnan(largest[2])
    assert list(np.signbit(largest[3:6])) == [False, False, True]
    assert list(np.signbit(smallest[3:6])) == [True, True, True]
    assert state.v[2, 0, 6] == state.v[3, 0, 6] == signalling | 0x400000  # IEEE mode: quiet, and it wins
    assert list(state.vf[4, 0, :2]) == [1, 2]


def test_signs_and_magnitudes_of_operands():
    state = execute(
        "v_add_f32_e64 v1, -v0, 1.0\nv_add_f32_e64 v2, |v0|, s0\nv_mul_f32_e64 v3, -|v0|, -1.0\n"
        "v_fma_f32 v4, -v0, v0, neg(0)\nv_exp_f32_e64 v5, -v0",
        v={0: floats(-2.0)},
        s={0: 0x3F000000},
    )
    assert [float(state.vf[n, 0, 0]) for n in range(1, 6)] == [3, 2.5, 2, -4, 4]


@pytest.mark.parametrize(
    "values", [(1, 2, 0.1, 65504, 65519.9, 65520, 1e9, 2.0**-24, 2.0**-25, 3 * 2.0**-26, -0.0)]
)
def test_half_precision_rounds_to_even_and_keeps_denormals(values):
    state = execute(
        "v_cvt_f16_f32_e32 v1, v0\nv_cvt_f32_f16_e32 v2, v1\nv_pack_b32_f16 v3, v1, v1\n"
        "v_cvt_f32_f16_sdwa v4, v3 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1",
        v={0: floats(*values), 1: 0xFFFFFFFF},
    )
    with np.errstate(over="ignore"):
        halves = floats(*values).astype(np.float16)
    assert (state.v[1, 0] == halves.view(np.uint16)).all()  # and zeros above
    assert same(state.vf[2, 0], halves.astype(np.float32))
    assert (state.v[3, 0] >> 16 == halves.view(np.uint16)).all()
    assert same(state.vf[4, 0], halves.astype(np.float32))
    assert list(halves[4:6]) == [65504, np.inf]


def test_mixed_precision():
    """op_sel_hi: the source is a half; op_sel: the high one. The f16 forms leave the other half alone."""
    pair = int(np.array([1.5, -3.0], np.float16).view(np.uint32)[0])  # low 1.5, high -3
    state = execute(
        "v_fma_mix_f32 v2, v0, v1, v0 op_sel:[1,0,0] op_sel_hi:[1,0,1]\n"
        "v_fma_mix_f32 v3, -v0, 1.0, v1 op_sel:[1,0,0] op_sel_hi:[1,1,0]\n"
        "v_fma_mixlo_f16 v4, v1, v1, v1\nv_fma_mixhi_f16 v5, v0, v1, 0 op_sel_hi:[1,0,0]\n"
        "v_fma_mixlo_f16 v6, v0, v1, neg(0) op_sel:[1,0,0] op_sel_hi:[1,0,0]",
        v={0: pair, 1: floats(0.25), 4: 0xABCD1234, 5: 0xABCD1234, 6: 0xABCD1234},
    )
    assert [float(state.vf[n, 0, 0]) for n in (2, 3)] == [-3 * 0.25 + 1.5, 3.25]
    halves = state.v[4:7, 0].view(np.float16).reshape(3, 64, 2)[:, 0]
    assert halves[0, 0] == 0.3125 and halves[1, 1] == 0.375 and halves[2, 0] == -0.75
    assert list(state.v[4:7, 0, 0] & np.array([0xFFFF0000, 0xFFFF, 0xFFFF0000], np.uint32)) == [
        0xABCD0000,
        0x1234,
        0xABCD0000,
    ]


def test_conversions_of_integers():
    values = floats(-1.5, 0.9, -0.9, 2.0**31, 2.0**32, 3e9, -3e9, np.nan, np.inf, -np.inf)
    state = execute("v_cvt_u32_f32_e32 v1, v0\nv_cvt_i32_f32_e32 v2, v0", v={0: values})
    assert list(state.v[1, 0, :10]) == [0, 0, 0, 2**31, 2**32 - 1, 3 * 10**9, 0, 0, 2**32 - 1, 0]
    wanted = [-1, 0, 0, 2**31 - 1, 2**31 - 1, 2**31 - 1, -(2**31), 0, 2**31 - 1, -(2**31)]
    assert list(state.v[2, 0, :10].view(np.int32)) == wanted
    state = execute(
        "v_cvt_f32_u32_e32 v1, v0\nv_cvt_f32_i32_e32 v2, v0", v={0: words(0xFFFFFFFF, 0x1000001, 0x1000003)}
    )
    assert list(state.vf[1, 0, :3]) == [2.0**32, 2.0**24, 2.0**24 + 4]  # to even
    assert list(state.vf[2, 0, :3]) == [-1, 2.0**24, 2.0**24 + 4]


def test_transcendental_functions():
    values = floats(0.0, -0.0, 1.0, 4.0, LEAST, -LEAST, 2.0**127, np.inf, -1.0, np.nan, 0.3)
    names = ("rcp", "rcp_iflag", "rsq", "sqrt", "exp", "log")
    text = "\n".join(f"v_{name}_f32_e32 v{n + 1}, v0" for n, name in enumerate(names))
    found = execute(text, v={0: values}).vf[1 : 1 + len(names), 0, :11]
    inf, nan = np.inf, np.nan
    assert same(found[0, :10], floats(inf, -inf, 1, 0.25, inf, -inf, 0, 0, -1, nan)[:10])
    assert same(found[1], found[0])
    assert same(found[2, :10], floats(inf, -inf, 1, 0.5, inf, -inf, 2**-63.5, 0, nan, nan)[:10])
    assert same(found[3, :10], floats(0, -0.0, 1, 2, 0, -0.0, 2**63.5, inf, nan, nan)[:10])
    assert same(found[4, :10], floats(1, 1, 2, 16, 1, 1, inf, inf, 0.5, nan)[:10])
    assert same(found[5, :10], floats(-inf, -inf, 0, 2, -inf, -inf, 127, inf, nan, nan)[:10])
    x = float(np.float32(0.3))
    assert same(found[:, 10], np.array([1 / x, 1 / x, x**-0.5, x**0.5, 2**x, np.log2(x)], np.float32))
    assert execute("v_exp_f32_e32 v1, v0", v={0: floats(-127.0)}).v[1, 0, 0] == 0  # a denormal result


def test_rounding_to_integers_and_scaling():
    values = floats(0.5, 1.5, 2.5, -0.5, -1.7, 1e10)
    state = execute(
        "v_rndne_f32_e32 v1, v0\nv_floor_f32_e32 v2, v0\nv_trunc_f32_e32 v3, v0\nv_ldexp_f32 v4, v0, -149\n"
        "v_ldexp_f32 v5, v0, v6",
        v={0: values, 6: words(1, -2)},
    )
    assert same(state.vf[1, 0, :6], floats(0, 2, 2, -0.0, -2, 1e10)[:6])
    assert same(state.vf[2, 0, :6], floats(0, 1, 2, -1, -2, 1e10)[:6])
    assert same(state.vf[3, 0, :6], floats(0, 1, 2, -0.0, -1, 1e10)[:6])
    assert same(state.vf[4, 0, :3], floats(0, 2 * LEAST, 2 * LEAST)[:3])  # ties to even
    assert list(state.vf[5, 0, :2]) == [1, 0.375]


@pytest.mark.parametrize(
    ("name", "wanted"),  # for (1, 2), (2, 2), (3, 2), (NaN, 2)
    [
        ("lt", (1, 0, 0, 0)),
        ("eq", (0, 1, 0, 0)),
        ("le", (1, 1, 0, 0)),
        ("gt", (0, 0, 1, 0)),
        ("lg", (1, 0, 1, 0)),
        ("ge", (0, 1, 1, 0)),
        ("o", (1, 1, 1, 0)),
        ("u", (0, 0, 0, 1)),
        ("nge", (1, 0, 0, 1)),
        ("nlg", (0, 1, 0, 1)),
        ("ngt", (1, 1, 0, 1)),
        ("nle", (0, 0, 1, 1)),
        ("neq", (1, 0, 1, 1)),
        ("nlt", (0, 1, 1, 1)),
    ],
)
def test_comparisons_know_nan(name, wanted):
    state = execute(f"v_cmp_{name}_f32_e64 s[0:1], v0, v1", v={0: floats(1, 2, 3, np.nan), 1: floats(2)})
    assert [int(state.s[0, 0]) >> n & 1 for n in range(4)] == list(wanted)


DIVISION = """v_div_scale_f32 v2, s[0:1], v1, v1, v0
v_div_scale_f32 v3, vcc, v0, v1, v0
v_rcp_f32_e32 v4, v2
v_fma_f32 v5, -v2, v4, 1.0
v_fmac_f32_e32 v4, v5, v4
v_mul_f32_e32 v5, v3, v4
v_fma_f32 v6, -v2, v5, v3
v_fmac_f32_e32 v5, v6, v4
v_fma_f32 v2, -v2, v5, v3
v_div_fmas_f32 v2, v2, v4, v5
v_div_fixup_f32 v7, v2, v1, v0"""


def test_a_whole_division_is_rounded_right():
    """LLVM's sequence for a float32 quotient, over all exponents and special values: what IEEE 754 says."""
    generator = np.random.default_rng(3)
    a, b = generator.integers(0, 2**32, (2, 100, 64), dtype=np.uint32).view(np.float32)
    pairs = [(x, y) for x in EDGES for y in EDGES]
    a.reshape(-1)[: len(pairs)], b.reshape(-1)[: len(pairs)] = zip(*pairs, strict=True)
    state = execute(DIVISION, v={0: a, 1: b}, waves=100)
    with np.errstate(all="ignore"):
        wanted = a / b
    normal = (np.abs(wanted) >= 2.0**-126) | (wanted == 0) | ~np.isfinite(wanted)
    assert same(np.where(normal, state.vf[7], 0), np.where(normal, wanted, 0))
    # a denormal quotient is rounded twice: by an ulp off at most
    away = np.abs(state.vf[7][~normal].astype(np.float64) - wanted[~normal])
    assert away.size and away.max() <= LEAST


def test_the_last_step_of_a_division_scales_where_vcc_says():
    state = execute(
        "v_div_fmas_f32 v3, v0, v1, v2",
        v={0: floats(1), 1: floats(2), 2: floats(3, 3, 0.25)},
        s={VCC: 6, VCC + 1: 0},
    )
    assert list(state.vf[3, 0, :3]) == [5, 5 * 2.0**64, 2.25 * 2.0**-64]
