"""Matrix instructions: where each value lies, as AMD's calculator says, and what is added to what."""

import numpy as np
import pytest
from gfx908_snippets import execute, floats

from benchmarks.gfx908.matrix import SHAPES, from_bf16

# opcode -> (rows, depth, values that a lane holds of A, dtype)
INSTRUCTIONS = {
    "v_mfma_f32_32x32x8f16": (32, 8, 4, "f16"),
    "v_mfma_f32_16x16x16f16": (16, 16, 4, "f16"),
    "v_mfma_f32_32x32x4bf16": (32, 4, 2, "bf16"),
    "v_mfma_f32_16x16x8bf16": (16, 8, 2, "bf16"),
    "v_mfma_f32_32x32x2f32": (32, 2, 1, "f32"),
    "v_mfma_f32_16x16x4f32": (16, 4, 1, "f32"),
}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as integers of the dtype's width."""
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if dtype == "bf16" else bits


def packed(matrix: np.ndarray, each: int, dtype: str) -> np.ndarray:
    """[rows, depth] as registers, uint32 [registers, 64]: lane g * rows + i holds row i at k = each * g + j."""
    rows, _ = matrix.shape
    lanes = [[matrix[lane % rows, each * (lane // rows) + j] for j in range(each)] for lane in range(64)]
    return np.ascontiguousarray(encode(np.array(lanes, np.float32), dtype)).view(np.uint32).T


def row_of(register: int, group: int, rows: int) -> int:
    return 8 * (register // 4) + 4 * group + register % 4 if rows == 32 else 4 * group + register


def names(kind: str, first: int, count: int) -> str:
    return f"{kind}{first}" if count == 1 else f"{kind}[{first}:{first + count - 1}]"


def test_all_shapes_are_tested():
    assert set(SHAPES) == set(INSTRUCTIONS)


@pytest.mark.parametrize("accumulators", [False, True], ids=["operands in v", "operands in a"])
@pytest.mark.parametrize("opcode", INSTRUCTIONS)
def test_layout(opcode, accumulators):
    """Small integers: exact. C is another range of accumulators than D, no lane is active, and two waves differ."""
    rows, depth, each, dtype = INSTRUCTIONS[opcode]
    generator = np.random.default_rng(rows + depth)
    a, b = generator.integers(-4, 5, (2, 2, rows, depth))
    c = generator.integers(-50, 51, (2, rows, rows))
    count, results = packed(a[0], each, dtype).shape[0], rows * rows // 64
    state_a, state_b = (np.stack([packed(m, each, dtype) for m in x], 1) for x in (a, b))
    tile = np.zeros((results, 2, 64), np.float32)
    for register in range(results):
        for lane in range(64):
            tile[register, :, lane] = c[:, row_of(register, lane // rows, rows), lane % rows]
    held = {40 + n: tile[n] for n in range(results)}
    given = {n: state_a[n] for n in range(count)} | {8 + n: state_b[n] for n in range(count)}
    if accumulators:
        held, given = held | given, {}
    kind = "a" if accumulators else "v"
    into, addend = names("a", 20, results), names("a", 40, results)
    text = f"{opcode} {into}, {names(kind, 0, count)}, {names(kind, 8, count)}, {addend}"
    state = execute(text, v=given, a=held | {20 + n: 0 for n in range(results)}, waves=2, exec_mask=0)
    wanted = np.einsum("wik,wjk->wij", a, b) + c
    found = state.a[20 : 20 + results].view(np.float32)
    for register in range(results):
        for lane in range(64):
            row, column = row_of(register, lane // rows, rows), lane % rows
            assert (found[register, :, lane] == wanted[:, row, column]).all(), (register, lane)


def test_a_constant_is_an_addend_and_results_may_replace_it():
    one = encode(np.ones(1, np.float32), "f32")[0]
    state = execute(
        "v_mfma_f32_16x16x4f32 a[0:3], v0, v0, 0\nv_mfma_f32_16x16x4f32 a[0:3], v0, v0, a[0:3]\n"
        "v_mfma_f32_16x16x4f32 a[4:7], v0, v0, 1.0",
        v={0: one},
    )
    assert (state.a[:4].view(np.float32) == 8).all() and (state.a[4:8].view(np.float32) == 5).all()


def test_denormals_infinities_and_rounding():
    tiny = packed(np.full((32, 8), 2.0**-24, np.float32), 4, "f16")
    state = execute("v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[0:1], 0", v={0: tiny[0], 1: tiny[1]})
    assert (state.a.view(np.float32) == 8 * 2.0**-48).all()  # denormal halves count
    large = packed(np.full((32, 8), 65504, np.float32), 4, "f16")
    state = execute(
        "v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[0:1], a[0:15]",
        v={0: large[0], 1: large[1]},
        a={n: floats(np.inf, -np.inf, np.nan, 1.0) for n in range(16)},
    )
    found = state.a.view(np.float32)[0, 0]
    assert list(found[:2]) == [np.inf, -np.inf] and np.isnan(found[2])
    assert found[3] == np.float32(8 * 65504.0**2 + 1)


def test_accumulators_are_moved_in_active_lanes():
    state = execute(
        "v_accvgpr_write_b32 a0, v0\nv_accvgpr_write_b32 a1, -1\nv_accvgpr_read_b32 v1, a0",
        v={0: 7, 1: 3},
        a={0: 1, 1: 1},
        exec_mask=0b10,
    )
    assert list(state.a[0, 0, :3]) == [1, 7, 1] and list(state.a[1, 0, :3]) == [1, 0xFFFFFFFF, 1]
    assert list(state.v[1, 0, :3]) == [3, 7, 3]


def test_bfloat16_is_the_upper_half_of_float32():
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], np.uint16)
    assert list(from_bf16(bits)) == [1, -2, np.inf, 2.0**-133]
