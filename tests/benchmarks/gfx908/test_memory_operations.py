"""Memory instructions: addresses, masks by a buffer's size, atomics, scalar loads."""

import numpy as np
import pytest
from gfx908_snippets import execute

from benchmarks.gfx908.faults import Fault, Unsupported
from benchmarks.gfx908.memory import Memory

LANE = np.arange(64, dtype=np.uint32)
DONE = "\ns_waitcnt vmcnt(0) lgkmcnt(0)\n"
MASKED = 0x80000000  # beyond any buffer: how Triton masks a lane


def memory(**blocks: np.ndarray) -> Memory:
    return Memory(
        {name: np.ascontiguousarray(data).view(np.uint8) for name, data in blocks.items()}, frozenset({"y"})
    )


def buffer(base: str, number: int = 8) -> tuple[str, dict[int, str]]:
    """Lines that make a buffer of a block at s[number:number+3], as Triton does, and the address for `execute`."""
    text = f"s_and_b32 s{number + 1}, s{number + 1}, 0xffff\ns_mov_b32 s{number + 2}, 0x7ffffffe\n"
    return f"{text}s_mov_b32 s{number + 3}, 0x27000\n", {number: base}


def test_buffer_loads():
    x = np.arange(1000, dtype=np.uint32)
    text, address = buffer("x")
    state = execute(
        f"{text}buffer_load_dword v1, v0, s[8:11], 0 offen offset:8\n"
        f"buffer_load_dwordx4 v[4:7], v0, s[8:11], s0 offen\n"
        f"buffer_load_ushort v2, v0, s[8:11], 0 offen offset:4\n"
        f"buffer_load_dwordx2 v[10:11], off, s[8:11], s0 offset:4{DONE}",
        v={0: LANE * 8},
        s={0: 400},
        memory=memory(x=x),
        address=address,
    )
    assert (state.v[1, 0] == 2 * LANE + 2).all() and (state.v[2, 0] == 2 * LANE + 1).all()
    assert (state.v[4:8, 0] == [2 * LANE + 100 + n for n in range(4)]).all()
    assert (state.v[10:12, 0] == [[101], [102]]).all()


def test_lanes_beyond_a_buffer_read_zero_and_write_nothing():
    text, address = buffer("x")
    target, more = buffer("y", 12)
    where = np.where(LANE % 2, MASKED, LANE * 4)
    place = memory(x=np.arange(1, 65, dtype=np.uint32), y=np.full(64, 7, np.uint32))
    state = execute(
        f"{text}{target}buffer_load_dword v1, v0, s[8:11], 0 offen{DONE}buffer_store_dword v2, v0, s[12:15], 0 offen",
        v={0: where, 1: 9, 2: 100 + LANE},
        memory=place,
        address=address | more,
    )
    assert (state.v[1, 0] == np.where(LANE % 2, 0, LANE + 1)).all()
    assert (place.contents("y").view(np.uint32) == np.where(LANE % 2, 7, 100 + LANE)).all()


def test_values_at_odd_halves():
    """fp16 tensors are read four bytes at a time from any element on."""
    x = np.arange(400, dtype=np.uint16)
    text, address = buffer("x")
    state = execute(
        f"{text}buffer_load_dwordx2 v[2:3], v0, s[8:11], 0 offen offset:2{DONE}",
        v={0: LANE * 4},
        memory=memory(x=x),
        address=address,
    )
    low = 2 * LANE + 1
    assert (state.v[2, 0] == low | (low + 1) << 16).all() and (
        state.v[3, 0] == low + 2 | (low + 3) << 16
    ).all()


def test_global_addresses():
    x = np.arange(4096, dtype=np.uint32)
    place = memory(x=x, y=np.zeros(64, np.uint32))
    base = place.address("x")
    full = base + LANE.astype(np.uint64) * 16
    state = execute(
        f"global_load_dwordx4 v[4:7], v[0:1], off offset:-16 glc slc\nglobal_load_dword v2, v3, s[0:1] offset:64{DONE}"
        f"global_store_short v8, v2, s[2:3]",
        v={0: (full + 16).astype(np.uint32), 1: full >> 32, 3: LANE * 4, 8: LANE * 2},
        memory=place,
        address={0: "x", 2: "y"},
    )
    assert (state.v[4:8, 0] == [4 * LANE + n for n in range(4)]).all()
    assert (state.v[2, 0] == LANE + 16).all()
    assert (place.contents("y").view(np.uint16)[:64] == LANE + 16).all()


def test_atomic_additions_return_what_was_there():
    place = memory(x=np.array([5, 0xFFFFFFFF], np.uint32))
    state = execute(
        f"global_atomic_add v1, v0, v2, s[0:1] glc{DONE}global_atomic_add v0, v2, s[0:1]",
        v={0: (LANE % 2) * 4, 1: 0, 2: 3},
        exec_mask=0b1111,
        memory=place,
        address={0: "x"},
    )
    assert list(state.v[1, 0, :5]) == [5, 0xFFFFFFFF, 8, 2, 0]
    assert list(place.contents("x").view(np.uint32)) == [5 + 12, 2 + 9]


def test_scalar_loads():
    x = np.arange(100, dtype=np.uint32)
    state = execute(
        f"s_load_dword s4, s[0:1], 0x10\ns_load_dwordx8 s[8:15], s[0:1], s2\ns_load_dwordx2 s[6:7], s[0:1], 0x0{DONE}",
        s={2: 80},
        memory=memory(x=x),
        address={0: "x"},
    )
    assert list(state.s[0, 4:5]) == [4] and list(state.s[0, 8:16]) == list(range(20, 28))
    assert list(state.s[0, 6:8]) == [0, 1]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("buffer_load_dword v1, v0, s[8:11], 0 offen offset:4", "bounds"),  # one beyond the last
        ("buffer_load_dwordx2 v[2:3], v0, s[8:11], 0 offen", "bounds"),
        ("global_load_dword v1, v0, s[0:1] offset:-4", "bounds"),
        ("s_load_dword s4, s[0:1], 0x100", "bounds"),
        ("global_load_dword v1, v0, s[2:3]", "undefined memory"),
        ("global_store_dword v4, v0, s[2:3]", "two stores"),
    ],
)
def test_accesses_that_are_found(line, kind):
    text, address = buffer("x")
    place = memory(x=LANE, y=LANE)
    given = {"v": {0: LANE * 4, 4: (LANE // 2) * 4}, "memory": place, "address": address | {0: "x", 2: "y"}}
    with pytest.raises(Fault) as found:
        execute(text + line, **given)
    assert found.value.kind == kind and line in str(found.value)


def test_a_descriptor_with_a_stride_is_refused():
    with pytest.raises(Unsupported, match="stride"):
        execute(
            "buffer_load_dword v1, v0, s[8:11], 0 offen",
            v={0: 0},
            s={8: 0, 9: 0x40000, 10: 100, 11: 0},
            memory=memory(x=LANE),
        )
