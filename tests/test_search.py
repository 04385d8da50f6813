"""The search finds the optimum of small spaces, keeps its budget, and resumes to the same answer."""

import itertools
import random

import pytest
from nets import build

from depthfuse import SubnetSpec, Supernet
from depthfuse.config import SearchConfig
from depthfuse.costs import CostError, CostTable
from depthfuse.search import BudgetError, SearchSpace, search

FAST = {"compact": 1.0, "dense": 1.5, "keep": 2.0}


@pytest.fixture
def supernet():
    return Supernet(build("resnet")[0])


def make_table(supernet, seed=0):
    rng = random.Random(seed)
    kept = {p: FAST["keep"] * rng.uniform(0.8, 1.2) for p in supernet.options()}
    saved = {
        p: {n: kept[p] - FAST[n] * rng.uniform(0.8, 1.2) for n in names}
        for p, names in supernet.options().items()
    }
    return CostTable({"model": "resnet18"}, "ms", 5.0 + sum(kept.values()), saved)


def additive_score(supernet, seed=1):
    rng = random.Random(seed)
    loss = {(p, n): rng.uniform(0, 3) for p, names in supernet.options().items() for n in names}
    return lambda choices: 90.0 - sum(loss[p, n] for p, n in choices.items())


def brute_force(supernet, table, score, feasible):
    options = {p: ["keep", *table.paying(p)] for p in supernet.options()}
    best = None
    for names in itertools.product(*options.values()):
        choices = {p: n for p, n in zip(options, names, strict=True) if n != "keep"}
        if feasible(choices) and (best is None or score(choices) > best[0]):
            best = (score(choices), choices)
    return best


SETTINGS = {"population": 40, "parents": 10, "generations": 12, "mutation": 0.15}


@pytest.mark.parametrize("seed", [0, 1])
def test_finds_the_optimum_under_a_latency_budget(supernet, seed):
    table, score = make_table(supernet, seed), additive_score(supernet, seed)
    budget = table.whole / 1.25
    best = brute_force(supernet, table, score, lambda c: table.cost(c) <= budget)
    spec = search(supernet, None, SearchConfig(speedup=1.25, **SETTINGS), table, score=score)
    assert table.cost(spec.mapping()) <= budget
    assert score(spec.mapping()) == pytest.approx(best[0], abs=0.3)
    same = search(supernet, None, SearchConfig(budget_ms=budget, **SETTINGS), table, score=score)
    assert same == spec


def test_finds_the_optimum_under_a_block_budget(supernet):
    table, score = make_table(supernet), additive_score(supernet)
    best = brute_force(supernet, table, score, lambda c: len(c) == 4)
    spec = search(supernet, None, SearchConfig(blocks=4, **SETTINGS), table, score=score)
    assert len(spec.choices) == 4
    assert score(spec.mapping()) == pytest.approx(best[0], abs=0.3)


@pytest.mark.parametrize("killed_after", [0, 1, 17, 60])
def test_resumes_to_the_same_answer(supernet, tmp_path, killed_after):
    table, score = make_table(supernet), additive_score(supernet)
    config = SearchConfig(blocks=3, population=16, parents=4, generations=6)
    wanted = search(supernet, None, config, table, score=score)
    journal, calls = tmp_path / "search.jsonl", []

    def dying(choices):
        if len(calls) == killed_after:
            raise KeyboardInterrupt
        calls.append(choices)
        return score(choices)

    with pytest.raises(KeyboardInterrupt):
        search(supernet, None, config, table, score=dying, journal=journal)
    if journal.exists():
        with journal.open("a") as file:
            file.write('{"choices": {"layer1.0": "comp')  # a line cut short by the crash
    again = []
    got = search(supernet, None, config, table, score=lambda c: again.append(c) or score(c), journal=journal)
    assert got == wanted
    assert not [c for c in again if c in calls]  # what was scored is not scored again


def test_seeds_decide(supernet):
    table, score = make_table(supernet), additive_score(supernet)
    config = SearchConfig(blocks=3, population=4, parents=2, generations=1)
    runs = {search(supernet, None, config, table, score=score, seed=s) for s in range(8)}
    assert len(runs) > 1
    assert search(supernet, None, config, table, score=score, seed=5) == search(
        supernet, None, config, table, score=score, seed=5
    )


def test_losing_merges_are_left_out_unless_allowed(supernet):
    table = make_table(supernet)
    table.saved["layer2.0"].update(compact=-1.0, dense=-1.0)
    space = SearchSpace(supernet, SearchConfig(blocks=2), table)
    assert "layer2.0" not in space.options
    space = SearchSpace(supernet, SearchConfig(blocks=2, losing_merges=True), table)
    assert space.options["layer2.0"] == ["compact", "dense"]


def test_infeasible_budgets_name_what_is_reachable(supernet):
    table = make_table(supernet)
    with pytest.raises(BudgetError, match=r"the fastest reachable takes \d+\.\d+ ms, 1\.\d\dx"):
        SearchSpace(supernet, SearchConfig(speedup=50.0), table)
    with pytest.raises(BudgetError, match="possible: 1 to 8"):
        SearchSpace(supernet, SearchConfig(blocks=9), table)
    with pytest.raises(BudgetError, match="exactly one budget"):
        SearchSpace(supernet, SearchConfig(), table)
    with pytest.raises(BudgetError, match="exactly one budget"):
        SearchSpace(supernet, SearchConfig(blocks=1, speedup=1.1), table)
    with pytest.raises(BudgetError, match="needs a latency table"):
        SearchSpace(supernet, SearchConfig(speedup=1.1))


def test_spec_round_trip_and_table_cover(supernet, tmp_path):
    supernet.set_choices({"layer1.0": "compact"})
    spec = supernet.spec()
    spec.save(tmp_path / "subnet.json")
    assert SubnetSpec.load(tmp_path / "subnet.json") == spec == SubnetSpec.from_json(spec.to_json())
    table = make_table(supernet)
    table.save(tmp_path / "latency.json")
    assert CostTable.load(tmp_path / "latency.json") == table
    del table.saved["layer1.0"]["dense"]
    with pytest.raises(CostError, match=r"lacks layer1\.0 \(dense\)"):
        table.check_covers(supernet.options(), "latency.json")
