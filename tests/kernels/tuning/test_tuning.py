"""Launch configurations: what is looked up where, which candidates are tried, what is kept, all without a GPU."""

import json
import logging
from dataclasses import asdict, astuple

import pytest
import torch

from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.launch import INTERPRETER, TARGETS
from depthfuse.kernels.tuning import lookup as tuning
from depthfuse.kernels.tuning import measure as tuner
from depthfuse.kernels.tuning import space
from depthfuse.kernels.tuning.lookup import Entry, Request, remember, session, tuned
from depthfuse.measured_cache import MeasuredCache

CPU = torch.device("cpu")
SHAPE = {"rows": 197, "channels": 192, "out_channels": 576, "norm": 0}
FACTS = {"device": "a card", "torch": "2", "triton": "3", "source": "old"}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No memory of earlier lookups, a user cache of the test's own for every device, and no packaged tables."""
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "configs")
    monkeypatch.setattr(tuning, "user_cache", lambda device: MeasuredCache(FACTS))
    tuning.packaged.cache_clear()
    tuning.enabled.cache_clear()
    yield
    tuning.packaged.cache_clear()
    tuning.enabled.cache_clear()


def request(op="linear", arch="sm_90", dtype=torch.float16, **changed) -> Request:
    return Request(op, dtype, tuple((SHAPE | changed).items()), TARGETS[arch], HEURISTIC, CPU)


def look_up(arch="sm_90", **changed):
    x = torch.empty(0, dtype=torch.float16)
    return tuned("linear", HEURISTIC, x, TARGETS[arch], **(SHAPE | changed))


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr(tuning, "_known", {})


CONFIG = GemmConfig(64, 32, 32, 8, 2, 3)
HEURISTIC = GemmConfig(64, 64, 64, 8, 4, 3)  # what `config_for` would pick
ENTRY = Entry(asdict(CONFIG), 5.0, 7.0)
FAR = GemmConfig(32, 256, 16, 1, 1, 1, 8)  # no candidate


def test_the_heuristic_decides_what_was_never_measured_and_in_the_interpreter():
    assert look_up() == HEURISTIC
    remember(request(), ENTRY)
    x = torch.empty(0, dtype=torch.float16)
    assert tuned("linear", HEURISTIC, x, INTERPRETER, **SHAPE) == HEURISTIC


def test_measurements_outlive_the_process(monkeypatch):
    remember(request(), ENTRY)
    forget(monkeypatch)
    assert look_up() == CONFIG
    assert look_up(rows=198) == HEURISTIC
    remember(request(rows=198), Entry(None, 3.0, 3.0))  # there the heuristic won
    forget(monkeypatch)
    assert look_up(rows=198) == HEURISTIC


def test_those_of_other_versions_cards_and_sources_do_not_count(monkeypatch):
    remember(request(), ENTRY)
    for name in FACTS:
        facts = FACTS | {name: "another"}
        forget(monkeypatch)
        monkeypatch.setattr(tuning, "user_cache", lambda device, facts=facts: MeasuredCache(facts))
        assert look_up() == HEURISTIC


def test_a_damaged_file_is_measured_anew(monkeypatch, caplog):
    remember(request(), ENTRY)
    cache, question = MeasuredCache(FACTS), {"launch": request().key()}
    damages = [
        lambda text=text: cache.path(question).write_text(text) for text in ("{", "[]", '{"key": "x"}')
    ]
    damages.append(lambda: cache.put(question, asdict(Entry({"a": 1}, 1.0, 1.0))))
    damages.append(lambda: cache.put(question, {"config": None}))
    for damage in damages:
        damage()
        forget(monkeypatch)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert look_up() == HEURISTIC
        assert "anew" in caplog.text
    remember(request(), ENTRY)
    forget(monkeypatch)
    assert look_up() == CONFIG


def test_packaged_tables_serve_where_the_user_measured_nothing(monkeypatch):
    tuning.PACKAGED.mkdir()
    table = {"configs": {request().key(): asdict(ENTRY), "broken": {"config": 1}}}
    (tuning.PACKAGED / "sm_90.json").write_text(json.dumps(table))
    assert look_up() == CONFIG
    assert look_up("gfx908") == HEURISTIC
    own = GemmConfig(32, 32, 32, 8, 2, 2)
    remember(request(), Entry(asdict(own), 4.0, 7.0))
    assert look_up() == own


def test_simulations_choose_only_where_nothing_was_measured():
    """And a measurement tries what they chose, however far it is from the heuristic's choice."""
    tuning.PACKAGED.mkdir()
    entry = asdict(Entry(asdict(FAR), 1.0, 7.0, simulated=True))
    (tuning.PACKAGED / "sm_90.json").write_text(json.dumps({"configs": {request().key(): entry}}))
    assert look_up() == FAR and tuning.known(request()).simulated
    assert FAR not in space.candidates(request())
    operator = Operator(lambda config: 5.0 if config == FAR else 10.0)
    found = tuner.tune(operator, timer=operator.timer)[request()]
    assert found == Entry(asdict(FAR), 5.0, 10.0) and not found.simulated
    operator = Operator(lambda config: 20.0 if config == FAR else 10.0)
    assert tuner.tune(operator, timer=operator.timer, again=True)[request()].config is None
    assert look_up() == HEURISTIC


def test_measurements_can_be_ignored(monkeypatch):
    remember(request(), ENTRY)
    monkeypatch.setenv("DEPTHFUSE_TUNE", "0")
    tuning.enabled.cache_clear()
    forget(monkeypatch)
    assert look_up() == HEURISTIC
    monkeypatch.setenv("DEPTHFUSE_TUNE", "yes")
    tuning.enabled.cache_clear()
    forget(monkeypatch)
    with pytest.raises(ValueError, match="DEPTHFUSE_TUNE is 'yes', expected 0 or 1"):
        look_up()


class Operator:
    """A call with two launches, whose result and time depend on the first's configuration."""

    def __init__(self, time_of, wrong=(), failing=()):
        self.time_of, self.wrong, self.failing = time_of, wrong, failing
        self.config, self.calls = None, 0

    def __call__(self):
        self.calls += 1
        self.config = look_up()
        look_up(rows=1, channels=7, out_channels=5)
        if self.config in self.failing:
            raise RuntimeError("out of resource: shared memory")
        return torch.full((4,), float("nan") if self.config in self.wrong else 1.0)

    def timer(self, call):
        call()
        return self.time_of(self.config)


def test_the_fastest_that_runs_and_is_right_is_kept(monkeypatch):
    options = space.candidates(request())
    assert len(options) > 8
    wrong, failing, best, second = options[:4]
    times = {wrong: 1.0, failing: 1.0, best: 5.0, second: 6.0}
    operator = Operator(lambda config: times.get(config, 10.0), {wrong}, {failing})
    entries = tuner.tune(operator, timer=operator.timer)
    assert [entry.config for entry in entries.values()] == [asdict(best), None]
    assert astuple(entries[request()])[1:3] == (5.0, 10.0)
    forget(monkeypatch)
    assert look_up() == best
    calls = operator.calls
    assert tuner.tune(operator, timer=operator.timer) == entries
    assert operator.calls == calls + 1  # only to see what it launches
    times[best] = 20.0
    assert tuner.tune(operator, timer=operator.timer, again=True)[request()].config == asdict(second)


def test_candidates_are_few_and_the_nearest_to_the_heuristics():
    few, all_of_them = space.candidates(request()), space.candidates(request(), most=10**6)
    assert len(few) == space.MOST < len(all_of_them)
    assert HEURISTIC not in all_of_them
    farthest = max(space.distance(config, HEURISTIC) for config in few)
    assert all(space.distance(config, HEURISTIC) >= farthest for config in set(all_of_them) - set(few))
    assert space.distance(HEURISTIC, HEURISTIC) == 0
    assert space.distance(GemmConfig(128, 32, 64, 8, 4, 3), HEURISTIC) == 2  # twice as high, half as wide


def test_candidates_are_compiled_before_they_are_measured():
    """Each runs once; those that fail are none of this step's business."""
    first, second = (
        len(space.candidates(r)) for r in (request(), request(rows=1, channels=7, out_channels=5))
    )
    operator = Operator(lambda config: 1.0, failing={space.candidates(request())[0]})
    tuner.compile_candidates(operator)
    assert operator.calls == 1 + first + second
    remember(request(), ENTRY)
    tuner.compile_candidates(operator)  # what is known needs none
    assert operator.calls == 2 + first + 2 * second


def test_a_gain_within_noise_is_none():
    operator = Operator(lambda config: 10.0 if config == HEURISTIC else 9.9)
    entries = tuner.tune(operator, timer=operator.timer)
    assert entries[request()] == Entry(None, 10.0, 10.0)


def test_sessions_are_seen_by_their_own_thread_alone():
    with session() as outer:
        look_up()
        with session() as inner:
            inner.forced[request()] = CONFIG
            assert look_up() == CONFIG
        assert look_up() == HEURISTIC
    assert list(outer.seen) == [request()]
    assert list(inner.seen) == []
