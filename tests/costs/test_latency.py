"""Cost tables: savings that add up, measurements that go on where they were cut short, and predictions.

Nothing is timed: see `fake_clock`.
"""

import dataclasses
import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_clock import Clock
from nets import SMALL, build, random_subnet

from depthfuse import Supernet
from depthfuse.checkpoint import load_json
from depthfuse.config import LatencyConfig, SearchConfig
from depthfuse.costs.counting import count_costs
from depthfuse.costs.latency import (
    check_prediction,
    conditions_of,
    make_latencies,
    measure_latencies,
    relative_errors,
    subnets_ms,
)
from depthfuse.costs.prediction import predict_latencies
from depthfuse.costs.table import CostTable
from depthfuse.errors import BudgetError, CostError
from depthfuse.measuring.counting import count_macs, count_parameters
from depthfuse.merging.variants import kept_copy, merged_model, variants_of
from depthfuse.searching.space import SearchSpace
from depthfuse.spec import ModelSource

CONFIG = LatencyConfig(rounds=3)


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


def small(family):
    model, size = build(family)
    return Supernet(model).eval(), size


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "convnext", "vit"])
def test_savings_add_up_to_the_subnet(family, clock):
    supernet, size = small(family)
    table = measure_latencies(supernet, size, CONFIG)
    assert table.unit == "ms" and table.conditions["predicted"] is False
    table.check_covers(supernet.options(), "the table")
    counted = count_costs(supernet, size, "parameters")
    assert table.whole == pytest.approx(counted.whole)
    for path, names in counted.saved.items():
        for name, saved in names.items():
            # measured with all alike merged, where a norm may also fold into the next block: a saving of the pair
            assert 0 <= table.saved[path][name] - saved + 1e-6 <= 0.02 * table.whole


def test_equal_blocks_share_one_measurement(clock):
    supernet, size = small("vit")
    table = measure_latencies(supernet, size, CONFIG)
    candidates = next(iter(supernet.options().values()))
    assert len(clock.measured) == len(candidates)  # three blocks of one kind
    assert len({tuple(names.items()) for names in table.saved.values()}) == 1
    model = ModelSource.make("resnet18", channels=(8, 12, 12, 12), layers=(3, 1, 1, 1)).build()
    supernet = Supernet(model)
    net = kept_copy(supernet)
    variants = variants_of(net, torch.zeros(1, 3, 45, 45))
    assert sorted((p, v.candidate) for v in variants for p in v.paths) == sorted(
        (p, name) for p, names in supernet.options().items() for name in names
    )
    together = {
        ("layer1.1", "layer1.2"),
        *((path,) for path in ("layer1.0", "layer2.0", "layer3.0", "layer4.0")),
    }
    assert {v.paths for v in variants} == together  # the maps of layer3 and layer4 differ in size
    assert set(net.choices().values()) == {"keep"}


def test_rates_that_only_training_uses_do_not_tell_blocks_apart(clock):
    name, kwargs, side = SMALL["vit"]
    model = ModelSource.make(name, **kwargs, drop_path_rate=0.3).build().eval()
    measure_latencies(Supernet(model), (3, side, side), CONFIG)
    first = len(clock.measured)
    measure_latencies(small("vit")[0], (3, side, side), CONFIG)
    # block 0 has no stochastic depth at all: an identity in its place
    assert first == 2 * (len(clock.measured) - first)


@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_a_killed_measurement_goes_on(killed_after, clock, tmp_path):
    supernet, size = small("resnet")
    wanted = measure_latencies(supernet, size, CONFIG)
    once = list(clock.measured)
    clock.measured.clear()
    cache, clock.dies_after = tmp_path / "latency.json", killed_after
    with pytest.raises(KeyboardInterrupt):
        measure_latencies(supernet, size, CONFIG, cache)
    if killed_after:
        assert CostTable.load(cache).lacking(supernet.options())
        with pytest.raises(CostError, match="lacks layer"):
            CostTable.load(cache).check_covers(supernet.options(), cache)
    clock.dies_after = None
    assert measure_latencies(supernet, size, CONFIG, cache) == wanted == CostTable.load(cache)
    assert clock.measured == once  # nothing twice
    assert measure_latencies(supernet, size, CONFIG, cache) == wanted
    assert clock.measured == once
    assert [p.name for p in tmp_path.iterdir()] == ["latency.json"]


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"dtype": "fp16"}, {"backend": "reference"}])
def test_other_conditions_are_measured_anew(change, clock, tmp_path):
    supernet, size = small("vit")
    cache = tmp_path / "latency.json"
    first = measure_latencies(supernet, size, CONFIG, cache)
    count = len(clock.measured)
    again = measure_latencies(supernet, size, dataclasses.replace(CONFIG, **change), cache)
    assert len(clock.measured) == 2 * count
    assert again.conditions != first.conditions and CostTable.load(cache) == again


def test_the_same_cache_under_another_measurement(clock, tmp_path):
    """While one measures, another does it all: both end with the whole table, and so does the file."""
    supernet, size = small("resnet")
    cache, others = tmp_path / "latency.json", []

    def meddle():
        if len(clock.measured) == 2 and not others:
            others.append(None)
            others[0] = measure_latencies(supernet, size, CONFIG, cache)

    clock.before = meddle
    table = measure_latencies(supernet, size, CONFIG, cache)
    assert others[0] == table == CostTable.load(cache)
    assert not table.lacking(supernet.options())


def test_two_processes_with_one_cache(tmp_path):
    code = (
        "import sys, pathlib, pytest, fake_clock, test_latency\n"
        "from depthfuse.costs import latency\n"
        "fake_clock.Clock().install(pytest.MonkeyPatch())\n"
        "supernet, size = test_latency.small('resnet')\n"
        "table = latency.measure_latencies(supernet, size, test_latency.CONFIG, pathlib.Path(sys.argv[1]))\n"
        "assert not table.lacking(supernet.options())"
    )
    cache, here = tmp_path / "latency.json", Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ["PYTHONPATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    both = [subprocess.Popen([sys.executable, "-c", code, cache], env=env) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    supernet, _ = small("resnet")
    CostTable.load(cache).check_covers(supernet.options(), cache)


def test_check_of_the_sums(clock):
    supernet, size = small("resnet")
    table = measure_latencies(supernet, size, CONFIG)
    checked = check_prediction(supernet, size, CONFIG, table, subnets=4)
    assert len(checked) == 4 and all(choices for choices, _, _ in checked)
    assert max(relative_errors(checked)) < 1e-12  # parameters are additive
    again = check_prediction(supernet, size, CONFIG, table, subnets=4)
    assert again == checked
    wrong = dataclasses.replace(table, whole=2 * table.whole)  # the savings are not doubled with it
    assert min(relative_errors(check_prediction(supernet, size, CONFIG, wrong, subnets=4))) > 0
    with pytest.raises(CostError, match="batch_size 1 there, 2 here"):
        check_prediction(supernet, size, dataclasses.replace(CONFIG, batch_size=2), table)
    with pytest.raises(CostError, match="only be checked on its own device"):
        check_prediction(supernet, size, CONFIG, predict_latencies(supernet, size, "mi100"))


def test_foreign_tables_are_refused_by_name(clock):
    supernet, size = small("vit")
    table = measure_latencies(supernet, size, CONFIG)
    here = conditions_of(supernet, size, CONFIG)
    table.check_conditions(here, "latency.json")
    away = dataclasses.replace(table, conditions=here | {"device": "a toaster", "torch": "1.0"})
    with pytest.raises(
        CostError, match=r"device 'a toaster' there, .* torch '1.0' there.*--latency.foreign-table"
    ):
        away.check_conditions(here, "latency.json")


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_predictions_repeat_and_follow_the_device(family):
    supernet, size = small(family)
    devices = ("mi100", "mi300x") if family == "vit" else ("mi100",)  # each plans every variant anew
    tables = {device: predict_latencies(supernet, size, device, torch.float16, 32) for device in devices}
    wholes = [table.whole for table in tables.values()]
    assert wholes == sorted(wholes, reverse=True) and len(set(wholes)) == len(wholes) and wholes[-1] > 0
    for table in tables.values():
        table.check_covers(supernet.options(), "the table")
        assert table.conditions["predicted"] is True and "us assumed" in table.conditions["source"]
        json.dumps(table.conditions)
    if family == "vit":
        assert predict_latencies(supernet, size, "mi100", torch.float16, 32) == tables["mi100"]
        assert predict_latencies(supernet, size, "mi100", torch.float32, 32).whole > tables["mi100"].whole
    assert set(tables["mi100"].conditions) - {"source"} == set(conditions_of(supernet, size, CONFIG))


def test_a_prediction_counts_any_batch_exactly(monkeypatch):
    """Straight lines through one and two images give what 5 images give."""
    from depthfuse.acceleration import accelerate
    from depthfuse.acceleration.checking.profile import count_operations
    from depthfuse.acceleration.planning.program import Call
    from depthfuse.costs import prediction
    from depthfuse.devices import DEVICES

    supernet, size = small("mobilenet")
    whole = merged_model(kept_copy(supernet), {})
    fast = accelerate(whole, torch.zeros(1, *size), backend="reference", verify=False, tune="off")
    peaks = DEVICES["sm_90"].peaks(torch.float16)
    counts = [count for _, count in count_operations(fast.made, Call.of((torch.zeros(5, *size),), {}))]
    wanted = sum(
        peaks.least_ms(2 * c.macs, c.bytes_moved / 2, c.matrix) + prediction.LAUNCH_US / 1e3 for c in counts
    )
    predicted = prediction._sum_ms(whole, torch.zeros(1, *size), "h100", torch.float16, 5)
    assert predicted == pytest.approx(wanted, rel=1e-12)
    assert sum(c.macs for c in counts) == 5 * count_macs(whole, size)


def test_unknown_devices_and_dtypes_list_the_known():
    supernet, size = small("vit")
    with pytest.raises(CostError, match="'abacus' are known: .* mi100, mi210, mi300x, a100, h100"):
        predict_latencies(supernet, size, "abacus")
    with pytest.raises(CostError, match="float32, float16 or bfloat16"):
        predict_latencies(supernet, size, "mi100", torch.float64)
    table = make_latencies(supernet, size, LatencyConfig(device="h100", dtype="bf16"))
    assert table.conditions["device"] == "H100 SXM" and table.conditions["dtype"] == "bfloat16"


@pytest.mark.parametrize(("seed", "family"), list(enumerate(SMALL)))
def test_counts_hold_for_whole_merged_models(family, seed):
    model, size = build(family)
    supernet = random_subnet(model, seed=seed, everything=seed % 2 == 1)
    choices = supernet.choices()
    merged = merged_model(kept_copy(supernet), choices)
    count = {"MACs": functools.partial(count_macs, input_size=size), "parameters": count_parameters}
    for unit, counted in count.items():
        table = count_costs(supernet, size, unit)
        if unit == "MACs":
            assert table.cost(choices) == counted(merged)
        else:  # a norm that folds into the next block is a saving of the pair: the sum is a bound from above
            assert counted(merged) <= table.cost(choices) <= 1.02 * counted(merged)
        assert table.whole == counted(merged_model(kept_copy(supernet), {}))
        assert table.unit == unit
    assert supernet.choices() == choices  # left alone
    with pytest.raises(CostError, match="'bytes'; known: MACs, parameters"):
        count_costs(supernet, size, "bytes")


def busy(name, latency_ms, index):
    """Something else runs now beside the variant, now beside the whole."""
    return latency_ms * (1.0 if name == "whole" else 0.6 if index % 2 else 1.6)


def test_noise_is_measured_again_and_then_told(clock, caplog):
    supernet, size = small("vit")
    quiet = measure_latencies(supernet, size, CONFIG)
    assert set(clock.rounds) == {3} and not quiet.noisy() and "noisy" not in caplog.text
    assert all(spread == 0.0 for names in quiet.spread.values() for spread in names.values())
    clock.rounds.clear()
    clock.disturb = busy
    table = measure_latencies(supernet, size, CONFIG)
    assert clock.rounds[1:4] == [3, 6, 12] and max(clock.rounds) == 12  # bounded
    entries = {f"{path} ({name})": (path, name) for path, names in table.saved.items() for name in names}
    assert table.noisy() and set(table.noisy()) <= set(entries)
    assert f"{len(table.noisy())} of {len(entries)} latencies are noisy" in caplog.text
    assert table.noisy()[0] in caplog.text
    path, name = entries[table.noisy()[0]]
    assert table.saving_in_words(path, name).endswith("(noisy)")
    assert "±" in quiet.saving_in_words(path, name) and "noisy" not in quiet.saving_in_words(path, name)


def test_a_disturbance_that_ends_is_measured_away(clock, caplog):
    supernet, size = small("vit")
    wanted = measure_latencies(supernet, size, CONFIG)
    # of the first three rounds two are disturbed, of the 21 that more rounds make of it still only these
    clock.disturb = lambda name, ms, index: (
        ms * 5 if name == "variant" and index < 2 and clock.rounds[-1] == 3 else ms
    )
    table = measure_latencies(supernet, size, CONFIG)
    assert table.saved == wanted.saved and not table.noisy() and "noisy" not in caplog.text


@pytest.mark.parametrize(("family", "slower"), [("resnet", 0.01), ("vit", 0.2), ("vit", 100.0)])
def test_no_subnet_costs_nothing_however_busy_the_machine(family, slower, clock, tmp_path, caplog):
    """The variants seem fast, since the whole ran beside other work; the closing check finds out."""
    supernet, size = small(family)
    clock.disturb = lambda name, ms, index: ms * slower if name == "variant" else ms
    table = measure_latencies(supernet, size, CONFIG, tmp_path / "latency.json")
    best = table.best()
    options = supernet.options()
    if slower < 1:
        (as_a_whole,) = clock.closed
        assert table.floor == pytest.approx(as_a_whole)
        assert table.cost(best) == pytest.approx(as_a_whole)
        assert "savings are scaled by" in caplog.text
    else:  # nothing pays
        assert best == {} and table.floor == table.whole
    rng = random.Random(0)
    for _ in range(50):
        choices = {path: rng.choice(names) for path, names in options.items()}
        assert table.cost(choices) >= 0.9 * table.floor > 0
    table.check_plausible("here")
    assert CostTable.load(tmp_path / "latency.json") == table
    with pytest.raises(BudgetError, match="the fastest reachable takes"):
        SearchSpace(options, SearchConfig(speedup=50.0), table)


def test_a_table_that_lacks_only_the_closing_check_is_closed(clock, tmp_path):
    supernet, size = small("vit")
    wanted = measure_latencies(supernet, size, CONFIG)
    cache, clock.dies_closing = tmp_path / "latency.json", True
    with pytest.raises(KeyboardInterrupt):
        measure_latencies(supernet, size, CONFIG, cache)
    assert CostTable.load(cache).floor is None and not CostTable.load(cache).lacking(supernet.options())
    clock.dies_closing = False
    clock.measured.clear()
    assert measure_latencies(supernet, size, CONFIG, cache) == wanted == CostTable.load(cache)
    assert not clock.measured
    # one that nobody closed and nobody checked
    document = load_json(cache)
    cut = {key: document[key] for key in ("conditions", "unit", "whole", "saved")}
    nonsense = {path: {n: 10 * v for n, v in names.items()} for path, names in document["saved"].items()}
    CostTable(**cut | {"saved": nonsense}).save(cache)
    table = measure_latencies(supernet, size, CONFIG, cache)
    assert not clock.measured and table.floor == wanted.floor
    assert table.cost(table.best()) == pytest.approx(wanted.floor)


@pytest.mark.parametrize("number", [1e9, float("nan"), float("inf"), float("-inf")])
def test_tables_that_cannot_be_true_are_refused(number):
    saved = {"a": {"dense": 0.5, "drop": number}, "b": {"dense": 0.4}}
    table = CostTable({"model": "toy"}, "ms", 1.0, saved)
    with pytest.raises(CostError, match="table.json cannot be true"):
        table.check_plausible("table.json")
    with pytest.raises(CostError, match="of toy cannot be true"):
        SearchSpace({"a": ["dense", "drop"], "b": ["dense"]}, SearchConfig(blocks=1), None, table)
    for whole in (0.0, -1.0, float("nan")):
        with pytest.raises(CostError, match="cannot be true"):
            CostTable({}, "ms", whole, {"a": {"dense": -0.5}}).check_plausible("table.json")
    CostTable({}, "ms", 1.0, {"a": {"dense": 0.9, "drop": -3.0}}).check_plausible("table.json")


def test_a_real_measurement(tmp_path):
    """Whatever the clock says here and now, the table can be true."""
    supernet, size = small("vit")
    table = measure_latencies(supernet, size, LatencyConfig(rounds=2), tmp_path / "latency.json")
    table.check_covers(supernet.options(), "the table")
    table.check_plausible("the table")
    assert 0 < table.floor <= table.whole and table.cost(table.best()) > 0.89 * table.floor
    assert all(set(table.spread[path]) == set(names) for path, names in table.saved.items())


def test_whole_subnets_are_measured_once(clock, tmp_path):
    """By the table's measure; of this machine alone; and anew where the table is of another one."""
    supernet, size = small("resnet")
    table, known = measure_latencies(supernet, size, CONFIG), tmp_path / "subnets.json"
    choices = dict(list(table.best().items())[:2])
    measure_ms = subnets_ms(supernet, size, CONFIG, table, known)
    measured = measure_ms(choices)
    assert measured == pytest.approx(clock_ms(supernet, choices), rel=1e-6)
    before = known.read_bytes()
    assert measure_ms(choices) == measured and known.read_bytes() == before
    assert subnets_ms(supernet, size, CONFIG, table, known)(choices) == measured
    twice = dataclasses.replace(
        table, conditions=table.conditions | {"model": "another"}, whole=2 * table.whole
    )
    assert subnets_ms(supernet, size, CONFIG, twice, known)(choices) == pytest.approx(2 * measured, rel=1e-6)
    assert known.read_bytes() != before
    elsewhere = dataclasses.replace(table, conditions=table.conditions | {"device": "another"})
    assert subnets_ms(supernet, size, CONFIG, elsewhere, known) is None
    assert subnets_ms(supernet, size, LatencyConfig(device="mi100"), table, known) is None


def clock_ms(supernet, choices):
    """What the fake clock takes for a subnet: its parameters."""
    return count_parameters(merged_model(kept_copy(supernet), choices))
