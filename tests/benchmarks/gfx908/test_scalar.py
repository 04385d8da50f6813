"""Scalar instructions, against Python's integers: edges, carries, and what SCC says."""

import pytest
from gfx908_snippets import VCC, execute

EDGES = (0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678)


def signed(x: int) -> int:
    return x - 2**32 if x >> 31 else x


def overflows(x: int) -> bool:
    return not -(2**31) <= x < 2**31


def field(x: int, b: int, is_signed: bool) -> int:
    offset, width = b & 31, min(b >> 16 & 127, 32)
    value = ((signed(x) if is_signed else x) >> offset) & (2**width - 1)
    return value - 2**width if is_signed and width and value >> (width - 1) else value


# opcode -> (exact result, SCC or None where it stays)
TWO = {
    "s_add_i32": lambda a, b: (a + b, overflows(signed(a) + signed(b))),
    "s_sub_i32": lambda a, b: (a - b, overflows(signed(a) - signed(b))),
    "s_add_u32": lambda a, b: (a + b, a + b >= 2**32),
    "s_sub_u32": lambda a, b: (a - b, a < b),
    "s_mul_i32": lambda a, b: (a * b, None),
    "s_mul_hi_u32": lambda a, b: (a * b >> 32, None),
    "s_mul_hi_i32": lambda a, b: (signed(a) * signed(b) >> 32, None),
    "s_min_i32": lambda a, b: (min(signed(a), signed(b)), signed(a) < signed(b)),
    "s_max_i32": lambda a, b: (max(signed(a), signed(b)), signed(a) > signed(b)),
    "s_min_u32": lambda a, b: (min(a, b), a < b),
    "s_max_u32": lambda a, b: (max(a, b), a > b),
    "s_lshl_b32": lambda a, b: (a << (b & 31), (a << (b & 31)) % 2**32 != 0),
    "s_lshr_b32": lambda a, b: (a >> (b & 31), a >> (b & 31) != 0),
    "s_ashr_i32": lambda a, b: (signed(a) >> (b & 31), signed(a) >> (b & 31) != 0),
    "s_lshl1_add_u32": lambda a, b: ((a << 1) + b, (a << 1) + b >= 2**32),
    "s_lshl4_add_u32": lambda a, b: ((a << 4) + b, (a << 4) + b >= 2**32),
    "s_and_b32": lambda a, b: (a & b, a & b != 0),
    "s_or_b32": lambda a, b: (a | b, a | b != 0),
    "s_xor_b32": lambda a, b: (a ^ b, a ^ b != 0),
    "s_andn2_b32": lambda a, b: (a & ~b, a & ~b != 0),
    "s_orn2_b32": lambda a, b: (a | ~b, (a | ~b) % 2**32 != 0),
    "s_nand_b32": lambda a, b: (~(a & b), ~(a & b) % 2**32 != 0),
    "s_nor_b32": lambda a, b: (~(a | b), ~(a | b) % 2**32 != 0),
    "s_xnor_b32": lambda a, b: (~(a ^ b), ~(a ^ b) % 2**32 != 0),
    "s_bfe_u32": lambda a, b: (field(a, b, False), field(a, b, False) != 0),
    "s_bfe_i32": lambda a, b: (field(a, b, True), field(a, b, True) != 0),
}


@pytest.mark.parametrize("opcode", TWO)
def test_two_operands(opcode):
    """All pairs of edges, each pair a wave."""
    seconds = EDGES + ((0x10000, 0x200000, 0x1F001F, 0x400004) if "bfe" in opcode else ())
    pairs = [(a, b) for a in EDGES for b in seconds]
    for before in (False, True):
        state = execute("s_mov_b32 s9, 0", waves=len(pairs), scc=before)
        state.s[:, 0], state.s[:, 1] = zip(*pairs, strict=True)
        run_on(state, f"{opcode} s2, s0, s1")
        for wave, pair in enumerate(pairs):
            value, scc = TWO[opcode](*pair)
            assert state.s[wave, 2] == value % 2**32, (opcode, pair)
            assert state.scc[wave] == (before if scc is None else scc), (opcode, pair)


def run_on(state, line: str) -> None:
    from benchmarks.gfx908.assembly import instruction
    from benchmarks.gfx908.operations import build

    build(instruction(*line.split(" ", 1))).run(state)


def test_carries_go_from_word_to_word():
    a, b = 0x1_8000_0000_FFFF_FFFF, 0x0_7FFF_FFFF_0000_0001
    state = execute(
        "s_add_u32 s4, s0, s2\ns_addc_u32 s5, s1, s3\ns_sub_u32 s6, s0, s2\ns_subb_u32 s7, s1, s3",
        s={0: a, 1: a >> 32, 2: b, 3: b >> 32},
    )
    assert int(state.s[0, 4]) | int(state.s[0, 5]) << 32 == (a + b) % 2**64
    assert int(state.s[0, 6]) | int(state.s[0, 7]) << 32 == (a - b) % 2**64
    assert not state.scc[0]


def test_immediates_of_16_bits_are_extended():
    state = execute("s_movk_i32 s0, 0x8000\ns_movk_i32 s1, 0x7fff\ns_mulk_i32 s2, 0xffff", s={2: 5})
    assert list(state.s[0, :3]) == [0xFFFF8000, 0x7FFF, 2**32 - 5]
    assert execute("s_addk_i32 s0, 0x1", s={0: 0x7FFFFFFF}).scc[0]
    assert not execute("s_addk_i32 s0, 0xffff", s={0: 1}).scc[0]
    assert execute("s_cmpk_lt_u32 s0, 0xffff", s={0: 0xFFFE}).scc[0]
    assert not execute("s_cmpk_lt_i32 s0, 0xffff", s={0: 0xFFFE}).scc[0]


@pytest.mark.parametrize(
    ("name", "wanted"), [("eq", 0), ("lg", 1), ("gt", 0), ("ge", 0), ("lt", 1), ("le", 1)]
)
def test_comparisons_know_signs(name, wanted):
    assert execute(f"s_cmp_{name}_i32 s0, 1", s={0: -1}, scc=not wanted).scc[0] == wanted
    opposite = wanted if name in ("eq", "lg") else 1 - wanted
    assert execute(f"s_cmp_{name}_u32 s0, 1", s={0: -1}, scc=not opposite).scc[0] == opposite


def test_pairs():
    state = execute(
        "s_lshl_b64 s[4:5], s[0:1], 33\ns_lshr_b64 s[6:7], s[0:1], 33\ns_bcnt1_i32_b64 s8, s[0:1]\n"
        "s_not_b64 s[10:11], s[0:1]\ns_cmp_lg_u64 s[0:1], s[0:1]\ns_cselect_b64 s[12:13], -1, s[0:1]",
        s={0: 0x80000003, 1: 0xF0000001},
    )
    assert list(state.s[0, 4:9]) == [0, 6, 0x78000000, 0, 3 + 5]
    assert list(state.s[0, 10:14]) == [0x7FFFFFFC, 0x0FFFFFFE, 0x80000003, 0xF0000001]


def test_single_bits():
    state = execute(
        "s_bitset1_b32 s0, 31\ns_bitset0_b32 s0, 0\ns_abs_i32 s1, s2\ns_brev_b32 s3, s0\ns_bitcmp1_b32 s0, 63",
        s={0: 1, 2: 0x80000000},
    )
    assert list(state.s[0, [0, 1, 3]]) == [0x80000000, 0x80000000, 1]
    assert state.scc[0]


def test_exec_is_saved_and_narrowed():
    mask = 0xF0F0_0000_0000_00FF
    state = execute("s_and_saveexec_b64 s[0:1], vcc", s={VCC: 0xF, VCC + 1: 0xFFFF0000}, exec_mask=mask)
    assert int(state.s64[0, 0]) == mask
    assert int(state.exec[0]) == 0xF0F0_0000_0000_000F
    assert state.scc[0] and state.lanes[0].sum() == 12 and not state.full
    state = execute("s_and_saveexec_b64 s[0:1], s[2:3]", s={2: 0, 3: 0})
    assert not state.scc[0] and not state.lanes.any()
    state = execute("s_andn2_saveexec_b64 s[0:1], s[2:3]", s={2: 0xFF, 3: 0}, exec_mask=0xF)
    assert int(state.exec[0]) == 0xF0


def test_an_unknown_instruction_is_named_with_its_text():
    from benchmarks.gfx908.faults import Unsupported

    with pytest.raises(Unsupported, match="s_frobnicate_b32 s0, s1"):
        execute("s_frobnicate_b32 s0, s1")
    with pytest.raises(Unsupported, match="v_add_f32_e64 v0, v1, v2 clamp"):
        execute("v_add_f32_e64 v0, v1, v2 clamp")
