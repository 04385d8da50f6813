"""The model of a compute unit's time, where the answer is known: peak rates, latencies, bandwidth, hiding of waits."""

import pytest

from benchmarks.gfx908 import validation
from benchmarks.gfx908.cycles import ComputeUnit, Parameters
from benchmarks.gfx908.trace import BARRIER, Event

P = Parameters()
MATRIX, VECTOR, SCALAR = Event("matrix", 64), Event("vector", 4), Event("scalar", 4)


def clocks(*workgroups: list[list[Event]], resident: int = 1, fresh: float = 0.0) -> float:
    return ComputeUnit(P, fresh).run(list(workgroups), resident)[-1]


def loads(count: int, first: int = 0, lines: int = 16) -> list[Event]:
    return [
        Event("memory", lines, tuple(range(first + n * lines, first + (n + 1) * lines))) for n in range(count)
    ]


def wait(memory: int | None = None, local: int | None = None) -> Event:
    return Event("wait", waits=(memory, local))


def test_units_work_at_their_peak_rates():
    """A 32 x 32 x 8 product of fp16 is 16,384 operations: four SIMDs do 1,024 a clock, 184.6 TFLOP/s by 120 units."""
    time = clocks([[MATRIX] * 100] * 4)
    assert 4 * 100 * 16384 / time == pytest.approx(1024, rel=0.01)
    assert clocks([[VECTOR] * 100] * 4) == pytest.approx(400, rel=0.01)
    assert clocks([[VECTOR] * 100] * 8) == pytest.approx(
        800, rel=0.01
    )  # two waves share a SIMD's vector unit
    assert clocks([[SCALAR] * 100] * 4) == pytest.approx(400, rel=0.01)
    lds = [*[Event("lds", 8)] * 100, wait(None, 0)]
    assert clocks([lds] * 4) == pytest.approx(3200 + P.lds_latency, rel=0.01)  # one LDS for all


def test_matrix_and_vector_units_run_side_by_side():
    mixed = [MATRIX, *[VECTOR] * 15] * 50
    assert clocks([mixed] * 4) == pytest.approx(50 * 64, rel=0.02)
    # a wave that waits for its own products leaves the units to others
    assert clocks([[VECTOR] * 800] * 4, [[MATRIX] * 50] * 4, resident=2) == pytest.approx(3200, rel=0.1)


def test_a_wave_issues_one_instruction_in_four_clocks():
    assert clocks([[VECTOR, SCALAR] * 100]) == pytest.approx(800, rel=0.01)
    assert clocks([[Event("pause", 32)] * 10]) == 320


def test_latencies_of_the_memories():
    load = loads(1)
    first = clocks([[*load, wait(0)]])
    assert first == pytest.approx(P.second_latency + 16 + 16 * 64 / P.second_bytes + 4, abs=8)
    again = clocks([[*load, wait(0), *load, wait(0)]])
    assert again - first == pytest.approx(P.cache_latency + 16 + 8, abs=8)
    far = clocks([[*load, wait(0)]], fresh=1.0)
    assert far == pytest.approx(P.memory_latency + 16 * 64 / P.memory_bytes + 4, abs=20)
    assert clocks([[Event("lds", 8), wait(None, 0)]]) == pytest.approx(8 + P.lds_latency + 4, abs=8)
    assert clocks([[Event("constant"), wait(None, 0)]]) == pytest.approx(P.constant_latency + 4, abs=8)


def test_the_first_cache_holds_so_many_lines():
    fits, does_not = loads(16), loads(17)  # 256 and 272 lines
    warm = clocks([[*fits, wait(0), *fits, wait(0)]]) - clocks([[*fits, wait(0)]])
    cold = clocks([[*does_not, wait(0), *does_not, wait(0)]]) - clocks([[*does_not, wait(0)]])
    assert cold > warm + P.second_latency - P.cache_latency


def test_waits_count_from_the_oldest():
    two = loads(2)
    assert clocks([[*two, wait(1), VECTOR]]) < clocks([[*two, wait(0), VECTOR]])
    assert clocks([[*two, wait(2), VECTOR]]) < 50
    assert clocks([[*two, wait(None, 0), VECTOR]]) < 50


def test_streams_reach_the_bandwidth_of_memory():
    """Enough waves with enough loads: as many bytes a clock as memory gives; few of them: less, for the latency."""
    many = [[[*loads(8, first=1000 * (8 * n + w)), wait(0)] for w in range(8)] for n in range(40)]
    total = 40 * 8 * 8 * 16 * 64
    assert total / clocks(*many, resident=5, fresh=1.0) == pytest.approx(P.memory_bytes, rel=0.03)
    slow = [[wait(0) if n % 2 else loads(1, first=100 * n)[0] for n in range(200)]]
    assert 100 * 16 * 64 / clocks(slow, fresh=1.0) < 0.5 * P.memory_bytes


def test_other_workgroups_hide_what_one_waits_for():
    work = [[*loads(1, first=1000 * n), wait(0), *[MATRIX] * 4] for n in range(20)]
    turn = [event for part in work for event in part]
    alone, together = clocks([turn] * 4), clocks(*[[turn] * 4] * 4, resident=4)
    least = 20 * 4 * 64  # the matrix units' time
    assert alone > 1.5 * least and 4 * least <= together < 1.02 * 4 * least


def test_barriers_hold_the_early_ones():
    late = [VECTOR] * 100
    time = clocks([[BARRIER, MATRIX], [*late, BARRIER, MATRIX]])
    assert time == pytest.approx(400 + 4 + 4, abs=12)  # the product itself is not waited for


def test_new_workgroups_start_when_one_ends():
    one = [[VECTOR] * 100] * 4
    ends = ComputeUnit(P, 0.0).run([one] * 6, resident=2)
    assert len(ends) == 6 and ends == sorted(ends)
    assert ends[-1] == pytest.approx(6 * 400, rel=0.02)


def test_published_rates_and_bandwidths_are_reached():
    found = {row.what: row for row in validation.peaks()}
    assert len(found) == 8
    for row in found.values():
        assert abs(row.deviation) < (0.15 if row.unit == "GB/s" else 0.01), row


def test_few_compute_units_have_more_of_what_all_share():
    assert P.shared_by(120) == P
    assert P.shared_by(60).second_bytes == 2 * P.second_bytes
    assert P.shared_by(60).memory_bytes == 2 * P.memory_bytes
    assert P.shared_by(1).second_bytes == P.shared_by(1).memory_bytes == P.line_bytes


@pytest.mark.parametrize(("stores", "late"), [(P.backlog_bytes // 1024, False), (200, True)])
def test_loads_go_before_stores_that_the_second_cache_holds(stores, late):
    """As many as fit cost a load no more than the second cache's time; those beyond wait for memory."""
    written = [
        Event("memory", 16, tuple(range(1000 + 16 * n, 1016 + 16 * n)), loads=False) for n in range(stores)
    ]
    load = [*loads(1), wait(0)]
    alone = clocks([load], fresh=1.0)
    after = clocks([[*written, *load]], fresh=1.0) - alone
    through_second = stores * 1024 / P.second_bytes
    through_memory = (stores * 1024 - P.backlog_bytes) / P.memory_bytes
    assert after == pytest.approx(through_memory if late else through_second, rel=0.1, abs=100)
    assert (through_memory > through_second) is late
