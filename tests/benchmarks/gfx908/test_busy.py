"""How long units are busy: bank conflicts and cache lines by addresses, clocks by instruction."""

import numpy as np
import pytest
from gfx908_snippets import execute

from benchmarks.gfx908.busy import Busy, lds_clocks, lines_of
from benchmarks.gfx908.machine import Machine
from benchmarks.gfx908.memory import Memory

LANE = np.arange(64)
ALL = np.ones((1, 64), bool)


@pytest.mark.parametrize(
    ("address", "width", "reads", "clocks"),
    [
        (LANE * 4, 4, True, 2),  # 32 banks a clock
        (LANE * 0, 4, True, 2),  # one word for all
        (LANE * 8, 4, True, 4),  # every other bank
        (LANE * 128, 4, True, 64),  # all in one bank
        (LANE * 2, 2, True, 2),  # two lanes share a word
        (LANE * 8, 8, True, 4),
        (LANE * 16, 16, True, 8),
        (LANE * 16, 16, False, 8),
        (LANE * 128, 16, True, 64),  # rows of 128 bytes, all at the same column
        (LANE * 128 + (LANE % 8) * 16, 16, True, 8),  # the same, columns swizzled
        # rows in pairs: conflicts only where lanes of one group are 8 apart
        ((LANE // 16) * 128 + (LANE % 8) * 16, 16, False, 8),
    ],
)
def test_clocks_of_lds(address, width, reads, clocks):
    assert lds_clocks(address[None], ALL, width, reads) == clocks


def test_lanes_of_a_wide_read_go_in_as_documented():
    """0:3+20:23 and so on, and of a write lane by lane: four lanes in the first 16 banks, four in the others."""
    for others, of_a_read in ((20, 1), (16, 2)):
        second = (others <= LANE) & (others + 4 > LANE)
        address = np.where(second, LANE - others + 4, LANE) * 16
        lanes = ((LANE < 4) | second)[None]
        assert lds_clocks(address[None], lanes, 16, reads=True) == of_a_read
        assert lds_clocks(address[None], lanes, 16, reads=False) == 2
    assert lds_clocks(address[None], ~ALL, 16, reads=True) == 0


def test_lines():
    lines = lines_of(np.array([LANE * 4, LANE * 64 + 60]), np.array([LANE < 32, LANE < 3]), 8)
    assert [list(wave) for wave in lines] == [[0, 1, 2], [0, 1, 2, 3]]


def test_units_of_instructions(monkeypatch):
    busy = Busy()
    monkeypatch.setattr(Machine, "watcher", busy)
    memory = Memory({"x": np.zeros(4096, np.uint8)})
    execute(
        """v_add_f32_e32 v1, v0, v0
        v_exp_f32_e32 v1, v0
        v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[0:1], 0
        s_nop 7
        s_add_i32 s4, s4, s4
        ds_write_b32 v0, v1
        global_load_dword v2, v0, s[0:1]
        s_waitcnt vmcnt(0) lgkmcnt(0)""",
        v={0: LANE * 8},
        s={4: 1},
        lds=512,
        memory=memory,
        address={0: "x"},
    )
    assert busy.executed == 9
    assert busy.clocks == {"vector": 4 + 16 + 4, "matrix": 64, "scalar": 8, "lds": 4, "cache": 8}
    assert busy.least_lds == 2 and len(busy.lines) == 8
    assert busy.of_a_workgroup() == {"vector": 6, "matrix": 16, "scalar": 2, "lds": 4, "cache": 8}
