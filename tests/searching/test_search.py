"""Every strategy keeps its budget and resumes to the same answer; the exact one equals brute force."""

import dataclasses
import itertools
import random

import pytest
from nets import build
from synthetic_searches import additive_judge, make_table

from depthfuse import SubnetSpec, Supernet
from depthfuse.config import SearchConfig
from depthfuse.costs.table import CostTable
from depthfuse.errors import BudgetError, CostError
from depthfuse.searching.search import front_csv, search
from depthfuse.searching.space import SearchSpace
from depthfuse.searching.strategies import STRATEGIES, best_additive, importances, pareto

SETTINGS = {"population": 40, "parents": 10, "generations": 12, "mutation": 0.15}
SEARCHING = sorted(set(STRATEGIES) - {"pick"})


@pytest.fixture
def supernet():
    return Supernet(build("resnet")[0])


def synthetic_options(blocks, candidates=4):
    return {f"b{i}": [f"c{j}" for j in range(candidates)] for i in range(blocks)}


def brute_force(space, judge, level):
    best = None
    for names in itertools.product(*(["keep", *names] for names in space.options.values())):
        choices = {p: n for p, n in zip(space.options, names, strict=True) if n != "keep"}
        if space.meets(choices, level) and (best is None or judge(choices).top1 > best[0]):
            best = (judge(choices).top1, choices)
    return best


BUDGETS = [{"speedup": 1.25}, {"speedup": 1.5}, {"budget_ms": 5.7}, {"blocks": 3}, {"blocks": 1}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_integer_programme_equals_brute_force(budget, seed):
    options = synthetic_options(5, 3)
    judge = additive_judge(options, seed)
    for forced in ((), ("b2",), ("b0=c1", "b3")):
        if budget.get("blocks") == 1 and len(forced) > 1:
            continue
        config = SearchConfig(force=forced, exclude=("b4=c0",), losing_merges=True, **budget)
        space = SearchSpace(options, config, make_table(options, seed, losing=True))
        level = space.levels(1)[0]
        lost = importances(space, lambda c: judge(c).top1)
        (best,) = best_additive(space, lost, level)
        assert space.meets(best, level)
        assert judge(best).top1 == pytest.approx(brute_force(space, judge, level)[0], abs=1e-9)


def test_the_integer_programme_lists_the_best_few_in_order():
    options = synthetic_options(4, 2)
    judge = additive_judge(options)
    space = SearchSpace(options, SearchConfig(blocks=2), make_table(options))
    lost = importances(space, lambda c: judge(c).top1)
    every = best_additive(space, lost, 2, count=1000)
    assert len(every) == 6 * 2 * 2 == len({tuple(c.items()) for c in every})
    scores = [judge(c).top1 for c in every]
    assert scores == pytest.approx(sorted(scores, reverse=True))


def test_of_each_form_the_integer_programme_lists_the_best():
    options = synthetic_options(4, 3)
    judge = additive_judge(options)
    forms = {path: {"c0": "dense", "c2": "dense"} for path in options}  # c1 is like no other
    space = SearchSpace(options, SearchConfig(blocks=2), make_table(options), forms=forms)
    lost = importances(space, lambda c: judge(c).top1)
    every = best_additive(space, lost, 2, count=1000)
    assert len(every) == 6 * 2 * 2
    for choices in every:
        for path, name in choices.items():
            assert name == "c1" or lost[path][name] == min(lost[path]["c0"], lost[path]["c2"])
    scores = [judge(c).top1 for c in every]
    assert scores == pytest.approx(sorted(scores, reverse=True))


@pytest.mark.parametrize("strategy", ["evolution", "milp", "random"])
def test_finalists_are_of_different_forms(supernet, strategy, monkeypatch):
    """Fitted blocks of the same layers differ in where they start only: four trainings ended alike."""
    options = supernet.options()
    monkeypatch.setattr(
        Supernet, "forms", lambda _: {p: dict.fromkeys(n, "same") for p, n in options.items()}
    )
    judge = additive_judge(options)
    config = SearchConfig(strategy=strategy, blocks=3, finalists=4, losing_merges=True, **SETTINGS)
    result = search(supernet, None, config, make_table(options), judge=judge)
    pruned = [frozenset(choices) for choices in result.finalists]
    assert len(pruned) == len(set(pruned)) == 4
    assert result.spec.mapping() == result.finalists[0]
    if strategy == "milp":  # the best of each form
        for choices in result.finalists:
            assert all(
                judge({path: name}).top1 == max(judge({path: other}).top1 for other in options[path])
                for path, name in choices.items()
            )


@pytest.mark.parametrize("strategy", ["evolution", "milp"])
@pytest.mark.parametrize("budget", BUDGETS[:4], ids=str)
def test_searches_find_the_optimum_of_additive_scores(supernet, strategy, budget):
    options = supernet.options()
    table, judge = make_table(options), additive_judge(options)
    config = SearchConfig(strategy=strategy, exclude=("layer4.1", "layer1.0"), **budget, **SETTINGS)
    best = {p: names[:2] for p, names in options.items()}
    narrow = SearchConfig(
        exclude=config.exclude + tuple(f"{p}={n}" for p, names in options.items() for n in names[2:]),
        strategy=strategy,
        **budget,
        **SETTINGS,
    )
    space = SearchSpace(options, narrow, table)
    assert all(set(names) <= set(best[p]) for p, names in space.options.items())
    wanted = brute_force(space, judge, space.levels(1)[0])[0]
    found = search(supernet, None, narrow, table, judge=judge).spec.mapping()
    assert space.allows(found)
    assert judge(found).top1 == pytest.approx(wanted, abs=0.3 if strategy == "evolution" else 1e-9)


@pytest.mark.parametrize("strategy", SEARCHING)
@pytest.mark.parametrize("budget", [*BUDGETS, {"macs": 0.7}, {"parameters": 0.8}], ids=str)
def test_every_strategy_keeps_its_budget(supernet, strategy, budget):
    options = supernet.options()
    table, judge = make_table(options, 3), additive_judge(options)
    unit = {"macs": "MACs", "parameters": "parameters"}.get(next(iter(budget)))
    costs = (
        CostTable({}, unit, 1000.0, {p: dict.fromkeys(n, 60.0) for p, n in options.items()}) if unit else None
    )
    first = next(iter(options))
    settings = {"strategy": strategy, "force": (first,), "exclude": ("layer2.0",)}
    config = SearchConfig(**settings, **budget, population=8, parents=3, generations=2)
    result = search(supernet, None, config, table, costs=costs, judge=judge)
    found = result.spec.mapping()
    assert SearchSpace(options, config, costs or table, table).allows(found)
    assert first in found and "layer2.0" not in found
    assert result.front


@pytest.mark.parametrize("strategy", SEARCHING)
def test_without_a_budget_the_front_spans_the_space(supernet, strategy, tmp_path):
    options = supernet.options()
    table, judge = make_table(options), additive_judge(options)
    config = SearchConfig(strategy=strategy, front=6, **SETTINGS)
    result = search(supernet, None, config, table, judge=judge, journal=tmp_path / "journal")
    assert result.spec is None
    costs, scores = [p.cost for p in result.front], [p.top1 for p in result.front]
    assert costs == sorted(costs) and scores == sorted(scores) and len(set(scores)) == len(scores)
    assert len(costs) >= 3 and costs[0] < 0.75 * table.whole
    lines = front_csv(result, table).splitlines()
    assert lines[0] == (
        "cost_ms,speedup,top1_holdout,top1_low,top1_high,points_lost,points_lost_low,points_lost_high,"
        "loss_holdout,divergence_holdout,images_holdout,blocks,choices"
    )
    assert len(lines) == 1 + len(costs)
    # any budget can then be picked without scoring more
    picked = search(
        supernet, None, SearchConfig(strategy="pick", speedup=1.2), table, journal=tmp_path / "journal"
    )
    assert table.cost(picked.spec.mapping()) <= table.whole / 1.2 * (1 + 1e-6)
    assert picked.scored == result.scored


def test_picking_needs_a_subnet_that_meets_the_budget(supernet):
    table = make_table(supernet.options())
    with pytest.raises(BudgetError, match="none of the 0 scored subnets meets the budget"):
        search(supernet, None, SearchConfig(strategy="pick", blocks=1), table)


@pytest.mark.parametrize("strategy", SEARCHING)
@pytest.mark.parametrize("killed_after", [0, 1, 17, 60])
def test_resumes_to_the_same_answer(supernet, tmp_path, strategy, killed_after):
    options = supernet.options()
    table, judge = make_table(options), additive_judge(options)
    config = SearchConfig(strategy=strategy, blocks=3, population=16, parents=4, generations=6)
    wanted = search(supernet, None, config, table, judge=judge)
    journal, calls = tmp_path / "search.jsonl", []

    def dying(choices):
        if len(calls) == killed_after:
            raise KeyboardInterrupt
        calls.append(choices)
        return judge(choices)

    if wanted.scored > killed_after:
        with pytest.raises(KeyboardInterrupt):
            search(supernet, None, config, table, judge=dying, journal=journal)
    if journal.exists():
        with journal.open("a") as file:
            file.write('{"choices": {"layer1.0": "comp')  # a line cut short by the crash
    again = []

    def counting(choices):
        again.append(choices)
        return judge(choices)

    got = search(supernet, None, config, table, judge=counting, journal=journal)
    assert got == wanted
    assert len(calls) + len(again) == wanted.scored  # what was scored is not scored again


def test_seeds_decide(supernet):
    options = supernet.options()
    table, judge = make_table(options), additive_judge(options)
    config = SearchConfig(blocks=3, population=4, parents=2, generations=1)
    runs = {search(supernet, None, config, table, judge=judge, seed=s).spec for s in range(8)}
    assert len(runs) > 1
    same = [search(supernet, None, config, table, judge=judge, seed=5).spec for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize("strategy", ["evolution", "milp", "greedy"])
def test_scorings_grow_at_most_linearly_with_the_blocks(strategy):
    counts = []
    for blocks in (16, 32, 64):
        options = synthetic_options(blocks)
        config = SearchConfig(speedup=1.3, strategy=strategy)
        space = SearchSpace(options, config, make_table(options))
        judge, seen = additive_judge(options), set()

        def score(choices, judge=judge, seen=seen):
            seen.add(tuple(choices.items()))
            return judge(choices).top1

        STRATEGIES[strategy].run(space, score, config, random.Random(0))
        counts.append(len(seen))
    assert counts[1] <= 2 * counts[0] and counts[2] <= 2 * counts[1]


def test_losing_merges_are_left_out_unless_allowed():
    options = synthetic_options(6, 2)
    table = make_table(options)
    table.saved["b2"].update(c0=-1.0, c1=-0.1)
    assert "b2" not in SearchSpace(options, SearchConfig(blocks=2), table).options
    space = SearchSpace(options, SearchConfig(blocks=2, losing_merges=True), table)
    assert space.options["b2"] == ["c0", "c1"]
    assert SearchSpace(options, SearchConfig(blocks=2, force=("b2=c0",)), table).options["b2"] == ["c0"]


def test_infeasible_budgets_name_what_is_reachable():
    options = synthetic_options(8, 2)
    table = make_table(options)
    with pytest.raises(BudgetError, match=r"the fastest reachable takes [\d.]+, \d\.\d\dx less"):
        SearchSpace(options, SearchConfig(speedup=50.0), table)
    fastest = table.cost({p: max(s, key=s.get) for p, s in table.saved.items()})
    SearchSpace(options, SearchConfig(budget_ms=fastest), table)  # just reachable
    measured = dataclasses.replace(table, floor=1.2 * fastest)  # of the fastest as a whole
    with pytest.raises(BudgetError, match=rf"the fastest reachable takes {1.2 * fastest:.4g}"):
        SearchSpace(options, SearchConfig(budget_ms=1.1 * fastest), measured)
    SearchSpace(options, SearchConfig(budget_ms=1.2 * fastest), measured)
    with pytest.raises(BudgetError, match="possible: 1 to 8"):
        SearchSpace(options, SearchConfig(blocks=9), table)
    with pytest.raises(BudgetError, match="possible: 2 to 8"):
        SearchSpace(options, SearchConfig(blocks=1, force=("b0", "b1")), table)
    with pytest.raises(BudgetError, match="exactly one budget.*blocks=1, speedup=1.1"):
        SearchSpace(options, SearchConfig(blocks=1, speedup=1.1), table)
    with pytest.raises(BudgetError, match="needs a table of costs"):
        SearchSpace(options, SearchConfig(speedup=1.1))


def test_no_search_goes_by_a_table_that_cannot_be_true(supernet):
    """Measured on a busy machine, a table promised 50x and more, and the search went along."""
    options = supernet.options()
    table = make_table(options)
    saved = {path: {n: 1.2 * len(options) / 7 for n in names} for path, names in options.items()}
    nonsense = dataclasses.replace(table, saved=saved)
    for budget in ({"speedup": 50.0}, {"blocks": 2}, {"macs": 0.9}, {}):
        costs = table if "macs" in budget else None
        with pytest.raises(CostError, match="cannot be true: of 9.6 ms for the whole model"):
            search(
                supernet, None, SearchConfig(**budget), nonsense, costs=costs, judge=additive_judge(options)
            )


def test_bad_names_list_the_known(supernet):
    options = synthetic_options(3, 2)
    with pytest.raises(BudgetError, match="cannot exclude block 'b9': this model has b0, b1, b2"):
        SearchSpace(options, SearchConfig(blocks=1, exclude=("b9",)))
    with pytest.raises(BudgetError, match="cannot force 'b1=tiny': the candidates of b1 are c0, c1"):
        SearchSpace(options, SearchConfig(blocks=1, force=("b1=tiny",)))
    with pytest.raises(BudgetError, match="both forced and excluded"):
        SearchSpace(options, SearchConfig(blocks=1, force=("b1",), exclude=("b1",)))
    with pytest.raises(BudgetError, match="unknown search strategy 'luck'; known: evolution, milp"):
        search(supernet, None, SearchConfig(blocks=1, strategy="luck"))


def test_names_may_be_patterns():
    options = {"a.0": ["dense", "drop"], "a.1": ["dense"], "b.0": ["drop", "compact"]}
    table = make_table(options)

    def space(**settings):
        return SearchSpace(options, SearchConfig(blocks=1, losing_merges=True, **settings), table)

    assert space(exclude=("*=dense",)).options == {"a.0": ["drop"], "b.0": ["drop", "compact"]}
    assert space(exclude=("a.*",)).options == {"b.0": ["drop", "compact"]}
    assert space(force=("b.*",), exclude=("*=drop",)).forced == {"b.0": ["compact"]}
    assert space(force=("a.?=drop",)).options["a.0"] == ["drop"]  # a.1 has none
    with pytest.raises(BudgetError, match=r"cannot exclude block 'c\.\*': this model has a.0, a.1, b.0"):
        space(exclude=("c.*",))
    with pytest.raises(
        BudgetError, match=r"cannot exclude 'a\.\*=tiny': the candidates of a\.\* are dense, drop"
    ):
        space(exclude=("a.*=tiny",))
    with pytest.raises(BudgetError, match="block a.1 is both forced and excluded"):
        space(force=("a.*",), exclude=("*=dense",))


def test_a_front_holds_what_nothing_beats():
    points = [(3, 3, "c"), (1, 1, "a"), (2, 1, "worse"), (2, 2, "b"), (3, 2, "worse"), (4, 3, "no better")]
    assert pareto(points) == ["a", "b", "c"]


def test_spec_round_trip_and_table_cover(supernet, tmp_path):
    supernet.set_choices({"layer1.0": "compact"})
    spec = supernet.spec()
    spec.save(tmp_path / "subnet.json")
    assert SubnetSpec.load(tmp_path / "subnet.json") == spec == SubnetSpec.from_json(spec.to_json())
    table = make_table(supernet.options())
    table.save(tmp_path / "latency.json")
    assert CostTable.load(tmp_path / "latency.json") == table
    del table.saved["layer1.0"]["dense"]
    with pytest.raises(CostError, match=r"lacks layer1\.0 \(dense\)"):
        table.check_covers(supernet.options(), "latency.json")
