"""Vector instructions on integers, lane by lane against Python's integers, and what EXEC, carries and lanes do."""

import numpy as np
import pytest
from gfx908_snippets import VCC, execute, words

EDGES = (
    0,
    1,
    2,
    15,
    16,
    31,
    32,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFF,
    0xFFFFFF,
    0x1000000,
    0x7FFFFFFF,
    0x80000000,
)
EDGES += (0xFFFFFFFE, 0xFFFFFFFF, 0x12345678, 0x89ABCDEF)


def signed(x: int, bits: int = 32) -> int:
    x %= 2**bits
    return x - 2**bits if x >> (bits - 1) else x


def field(a: int, offset: int, width: int) -> int:
    return (a >> (offset & 31)) & (2 ** (width & 31) - 1)


def byte(high: int, low: int, pick: int) -> int:
    both = high << 32 | low
    if pick <= 7:
        return both >> 8 * pick & 255
    if pick <= 11:
        return 255 * (both >> (16 * (pick - 8) + 15) & 1)
    return 0 if pick == 12 else 255


REFERENCES = {
    "v_mov_b32": lambda a: a,
    "v_not_b32": lambda a: ~a,
    "v_bfrev_b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "v_ffbh_u32": lambda a: 32 - a.bit_length() if a else -1,
    "v_add_u32": lambda a, b: a + b,
    "v_sub_u32": lambda a, b: a - b,
    "v_subrev_u32": lambda a, b: b - a,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_lshlrev_b32": lambda a, b: b << (a & 31),
    "v_lshrrev_b32": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32": lambda a, b: signed(b) >> (a & 31),
    "v_min_u32": min,
    "v_max_u32": max,
    "v_min_i32": lambda a, b: min(signed(a), signed(b)),
    "v_max_i32": lambda a, b: max(signed(a), signed(b)),
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": lambda a, b: a * b >> 32,
    "v_mul_hi_i32": lambda a, b: signed(a) * signed(b) >> 32,
    "v_mul_u32_u24": lambda a, b: (a % 2**24) * (b % 2**24),
    "v_mul_i32_i24": lambda a, b: signed(a, 24) * signed(b, 24),
    "v_mad_u32_u24": lambda a, b, c: (a % 2**24) * (b % 2**24) + c,
    "v_mad_i32_i24": lambda a, b, c: signed(a, 24) * signed(b, 24) + c,
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) << (c & 31),
    "v_lshl_add_u32": lambda a, b, c: (a << (b & 31)) + c,
    "v_lshl_or_b32": lambda a, b, c: (a << (b & 31)) | c,
    "v_and_or_b32": lambda a, b, c: (a & b) | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfi_b32": lambda a, b, c: (a & b) | (~a & c),
    "v_bfe_u32": field,
    "v_bfe_i32": lambda a, b, c: (
        signed(field(a, b, c) << (32 - (c & 31))) >> (32 - (c & 31)) if c & 31 else 0
    ),
    "v_alignbit_b32": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "v_perm_b32": lambda a, b, c: sum(byte(a, b, c >> 8 * n & 255) << 8 * n for n in range(4)),
    "v_min3_i32": lambda a, b, c: min(map(signed, (a, b, c))),
    "v_max3_i32": lambda a, b, c: max(map(signed, (a, b, c))),
    "v_min3_u32": min,
    "v_max3_u32": max,
    "v_med3_i32": lambda a, b, c: sorted(map(signed, (a, b, c)))[1],
    "v_add_u16": lambda a, b: (a + b) % 2**16,
    "v_sub_u16": lambda a, b: (a - b) % 2**16,
    "v_subrev_u16": lambda a, b: (b - a) % 2**16,
    "v_mul_lo_u16": lambda a, b: (a * b) % 2**16,
    "v_mad_legacy_u16": lambda a, b, c: (a * b + c) % 2**16,
    "v_lshlrev_b16": lambda a, b: (b << (a & 15)) % 2**16,
    "v_lshrrev_b16": lambda a, b: (b % 2**16) >> (a & 15),
    "v_ashrrev_i16": lambda a, b: (((b % 2**16) ^ 2**15) - 2**15 >> (a & 15)) % 2**16,
    "v_min_u16": lambda a, b: min(a % 2**16, b % 2**16),
    "v_max_u16": lambda a, b: max(a % 2**16, b % 2**16),
}


def test_every_function_has_a_reference():
    from benchmarks.gfx908.vector_integer import _U32

    assert set(_U32) == set(REFERENCES)


@pytest.mark.parametrize("opcode", REFERENCES)
def test_each_function(opcode):
    reference = REFERENCES[opcode]
    count = (
        2
        if reference in (min, max) and "3" not in opcode.split("_")[1]
        else 3
        if reference in (min, max)
        else 0
    )
    count = count or reference.__code__.co_argcount
    generator = np.random.default_rng(len(opcode))
    operands = generator.choice(np.array(EDGES, np.uint64), (8, count, 64)).astype(np.uint32)
    operands[-1] = generator.integers(0, 2**32, (count, 64), dtype=np.uint32)
    if opcode == "v_perm_b32":
        operands[:4, 2] = generator.integers(0, 14, (4, 64, 4)).astype(np.uint8).view(np.uint32)[..., 0]
    operands = operands.transpose(1, 0, 2)  # a wave for each draw
    names = ", ".join(f"v{n}" for n in range(count))
    state = execute(f"{opcode} v9, {names}", v=dict(enumerate(operands)), waves=8)
    for wave in range(8):
        for lane in range(64):
            values = [int(x) for x in operands[:, wave, lane]]
            assert state.v[9, wave, lane] == reference(*values) % 2**32, (opcode, [hex(x) for x in values])


def test_operands_are_scalars_and_constants_too():
    state = execute(
        "v_add3_u32 v1, v0, s0, -16\nv_mov_b32_e32 v2, 0x12345\nv_mul_lo_u32 v3, v0, 64\nv_mov_b32_e32 v4, 1.0\n"
        "v_mov_b32_e32 v5, -0.5\nv_mov_b32_e32 v6, vcc_hi",
        v={0: words(3, -1)},
        s={0: 0x80000000, VCC + 1: 7},
    )
    assert list(state.v[1:7, 0, 0]) == [0x80000000 - 13, 0x12345, 192, 0x3F800000, 0xBF000000, 7]
    assert state.v[3, 0, 1] == 2**32 - 64


def test_lanes_that_are_not_active_stay_as_they_are():
    mask = 0x8000_0000_0000_0005
    state = execute("v_mov_b32_e32 v0, 7\nv_cmp_ne_u32_e64 s[0:1], 9, v0", v={0: 1}, exec_mask=mask)
    assert [lane for lane in range(64) if state.v[0, 0, lane] == 7] == [0, 2, 63]
    assert int(state.s64[0, 0]) == mask  # bits of the others are 0, though they compare unequal
    state = execute("v_mov_b32_e32 v0, 7\nv_add_co_u32_e32 v1, vcc, -1, v0", v={0: 1, 1: 3}, exec_mask=0)
    assert (state.v[0] == 1).all() and (state.v[1] == 3).all() and int(state.vcc[0]) == 0


def test_carries_go_through_masks():
    a, b = (np.random.default_rng(n).integers(0, 2**64, 64, dtype=np.uint64) for n in (1, 2))
    a[:3], b[:3] = (2**64 - 1, 2**32 - 1, 0), (1, 1, 1)
    low, high = (
        (lambda x: (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)),
        (lambda x: (x >> np.uint64(32)).astype(np.uint32)),
    )
    state = execute(
        "v_add_co_u32_e32 v4, vcc, v0, v2\nv_addc_co_u32_e32 v5, vcc, v1, v3, vcc\n"
        "v_sub_co_u32_e64 v6, s[2:3], v0, v2\nv_subb_co_u32_e64 v7, s[4:5], v1, v3, s[2:3]\n"
        "v_subrev_co_u32_e32 v8, vcc, v2, v0\nv_subbrev_co_u32_e32 v9, vcc, v3, v1, vcc",
        v={0: low(a), 1: high(a), 2: low(b), 3: high(b)},
    )
    for pair, wanted in ((4, a + b), (6, a - b), (8, a - b)):
        assert (state.v[pair, 0] == low(wanted)).all() and (state.v[pair + 1, 0] == high(wanted)).all()
    assert int(state.s64[0, 2]) == sum(1 << n for n in range(64) if a[n] < b[n])


def test_products_of_64_bits():
    a, b = words(0xFFFFFFFF, 3, 0x80000000), words(0xFFFFFFFF, 5, 2)
    state = execute(
        "v_mad_u64_u32 v[4:5], s[2:3], v0, v1, v[2:3]\nv_mad_u64_u32 v[6:7], s[4:5], v0, 6, -1",
        v={0: a, 1: b, 2: 0xFFFFFFFF, 3: 0xFFFFFFFF},
    )
    for lane in range(3):
        x, y = int(a[lane]), int(b[lane])
        exact = x * y + 2**64 - 1
        assert int(state.v[4, 0, lane]) | int(state.v[5, 0, lane]) << 32 == exact % 2**64
        assert (int(state.s64[0, 1]) >> lane & 1) == (exact >= 2**64)
        assert int(state.v[6, 0, lane]) | int(state.v[7, 0, lane]) << 32 == (x * 6 - 1) % 2**64


def test_wide_shifts():
    state = execute(
        "v_lshlrev_b64 v[2:3], 33, v[0:1]\nv_lshrrev_b64 v[4:5], v6, v[0:1]\nv_ashrrev_i64 v[8:9], 65, v[0:1]",
        v={0: 0x80000003, 1: 0xF0000001, 6: words(0, 63, 64)},
    )
    assert list(state.v[2:4, 0, 0]) == [0, 6]
    assert [list(state.v[4:6, 0, lane]) for lane in range(3)] == [
        [0x80000003, 0xF0000001],
        [1, 0],
        [0x80000003, 0xF0000001],
    ]
    assert list(state.v[8:10, 0, 0]) == [0xC0000001, 0xF8000000]


@pytest.mark.parametrize("name", ["lt", "eq", "le", "gt", "ge", "ne"])
@pytest.mark.parametrize("dtype", ["i32", "u32", "u16", "i16"])
def test_comparisons(name, dtype):
    bits = int(dtype[1:])
    pairs = [(a, b) for a in EDGES[-8:] for b in EDGES[-8:]]
    a, b = (np.array(x, np.uint32) for x in zip(*pairs, strict=True))
    state = execute(f"v_cmp_{name}_{dtype}_e32 vcc, v0, v1", v={0: a, 1: b})
    python = {"lt": "<", "eq": "==", "le": "<=", "gt": ">", "ge": ">=", "ne": "!="}[name]
    for lane, pair in enumerate(pairs):
        x, y = (signed(n, bits) if dtype[0] == "i" else n % 2**bits for n in pair)
        assert (int(state.vcc[0]) >> lane & 1) == eval(f"{x} {python} {y}"), pair


def test_selection():
    state = execute(
        "v_cndmask_b32_e32 v2, v0, v1, vcc\nv_cndmask_b32_e64 v3, 5, -1, s[0:1]\nv_cndmask_b32_e64 v4, v0, |v1|, vcc\n"
        "v_cndmask_b32_sdwa v5, v0, v1, vcc dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:WORD_1",
        v={0: 0x11112222, 1: 0xB3334444},
        s={VCC: 2, VCC + 1: 0, 0: 1, 1: 0},
    )
    assert [list(state.v[n, 0, :2]) for n in (2, 3, 4, 5)] == [
        [0x11112222, 0xB3334444],
        [0xFFFFFFFF, 5],
        [0x11112222, 0x33334444],
        [0x11112222, 0xB333],
    ]


def test_parts_of_registers():
    text = "v_add_u32_sdwa v{}, v0, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:{} src1_sel:{}"
    selections = [("DWORD", "BYTE_1"), ("WORD_1", "WORD_0"), ("BYTE_3", "BYTE_0")]
    lines = [text.format(n + 2, *pair) for n, pair in enumerate(selections)]
    lines.append(
        "v_add_u32_sdwa v5, sext(v0), v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_3 src1_sel:BYTE_0"
    )
    state = execute("\n".join(lines), v={0: 0x89ABCDEF, 1: 0x01020304})
    assert list(state.v[2:6, 0, 0]) == [0x89ABCDEF + 3, 0x89AB + 0x304, 0x89 + 4, 0xFFFFFF89 + 4]


def test_lanes_read_and_written():
    values = np.arange(64, dtype=np.uint32) * 10
    state = execute(
        "v_readlane_b32 s0, v0, 63\nv_readlane_b32 s1, v0, s4\nv_readfirstlane_b32 s2, v0\nv_writelane_b32 v1, s0, 5",
        v={0: values, 1: 1},
        s={4: 66},
        exec_mask=0xFFFF_FFFF_FFFF_FF00,
    )
    assert list(state.s[0, :3]) == [630, 20, 80]
    assert state.v[1, 0, 5] == 630 and (state.v[1, 0] == 1).sum() == 63  # lane 5 is not active
    assert execute("v_readfirstlane_b32 s2, v0", v={0: values + 3}, exec_mask=0).s[0, 2] == 3


def test_lanes_below_are_counted():
    state = execute(
        "v_mbcnt_lo_u32_b32 v0, s0, 0\nv_mbcnt_hi_u32_b32 v0, s1, v0", s={0: 0xFFFF00FF, 1: 0x80000001}
    )
    mask = 0x80000001_FFFF00FF
    assert list(state.v[0, 0]) == [(mask & ((1 << lane) - 1)).bit_count() for lane in range(64)]


@pytest.mark.parametrize(
    ("pattern", "lane_of"),
    [
        ("quad_perm:[2,3,0,1]", lambda n: n ^ 2),
        ("quad_perm:[3,3,1,0]", lambda n: n // 4 * 4 + (3, 3, 1, 0)[n % 4]),
        ("row_ror:8", lambda n: n // 16 * 16 + (n - 8) % 16),
        ("row_ror:3", lambda n: n // 16 * 16 + (n - 3) % 16),
        ("row_shr:1", lambda n: n - 1 if n % 16 else None),
        ("row_shl:2", lambda n: n + 2 if n % 16 < 14 else None),
        ("row_mirror", lambda n: n // 16 * 16 + 15 - n % 16),
        ("row_half_mirror", lambda n: n // 8 * 8 + 7 - n % 8),
    ],
)
def test_values_of_other_lanes_in_a_row(pattern, lane_of):
    """A lane out of the row, or not active, reads as 0."""
    values = np.arange(100, 164, dtype=np.uint32)
    for mask in (2**64 - 1, 0xFFFF_FFFF_FFFF_FFFA):
        line = f"v_add_u32_dpp v1, v0, v2 {pattern} row_mask:0xf bank_mask:0xf bound_ctrl:1"
        state = execute(line, v={0: values, 1: 0, 2: 1000}, exec_mask=mask)
        for lane in range(64):
            other = lane_of(lane)
            moved = 100 + other if other is not None and mask >> other & 1 else 0
            assert state.v[1, 0, lane] == (1000 + moved if mask >> lane & 1 else 0)
