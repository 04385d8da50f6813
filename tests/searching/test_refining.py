"""What is found is as fast as was asked for when it is measured, however wrong the sums are."""

import dataclasses

import pytest
from nets import build
from synthetic_searches import additive_judge, make_table

from depthfuse import Supernet
from depthfuse.config import SearchConfig
from depthfuse.errors import BudgetError
from depthfuse.searching.refining import find_measured
from depthfuse.searching.search import search


@pytest.fixture
def supernet():
    return Supernet(build("resnet")[0])


def found_by(supernet, table, measure_ms, **budget):
    """(choices, latencies asked for) of a search whose subnets are measured by a rule."""
    asked = []

    def measured(choices):
        asked.append(choices)
        return measure_ms(choices)

    config = SearchConfig(**budget, strategy="milp")
    judge = additive_judge(supernet.options())
    result = search(supernet, None, config, table, judge=judge, measure_ms=measured)
    return dict(result.spec.mapping()), asked


# Each block saves so many times what the table says.
@pytest.mark.parametrize("times", [1.3, 1.15, 1.0, 0.85, 0.7])
@pytest.mark.parametrize("budget", [{"speedup": 1.2}, {"budget_ms": None}], ids=["speedup", "ms"])
def test_sums_that_err_are_mended(supernet, times, budget):
    table = make_table(supernet.options())
    limit_ms = table.whole / 1.2
    budget = {name: limit_ms if value is None else value for name, value in budget.items()}

    def true_ms(choices):
        return table.whole - times * (table.whole - table.cost(choices))

    choices, asked = found_by(supernet, table, true_ms, **budget)
    assert true_ms(choices) <= 1.000001 * limit_ms
    # the best of all, by truth: a table that is right finds the same without measuring
    right = make_table(supernet.options())
    for names in right.saved.values():
        for name in names:
            names[name] *= times
    config = SearchConfig(**budget, strategy="milp")
    best = search(supernet, None, config, right, judge=additive_judge(supernet.options())).spec
    assert choices == dict(best.mapping())
    assert len(asked) <= 6
    if times == 1.0:
        assert len({str(sorted(c.items())) for c in asked}) == len(asked) <= 2


def test_without_a_measurement_sums_decide(supernet):
    table = make_table(supernet.options())
    config = SearchConfig(speedup=1.2)
    judge = additive_judge(supernet.options())
    summed = search(supernet, None, config, table, judge=judge).spec
    assert table.cost(dict(summed.mapping())) <= table.whole / 1.2


def test_other_budgets_are_not_measured(supernet):
    def never(choices):
        raise AssertionError("measured")

    table = make_table(supernet.options())
    judge = additive_judge(supernet.options())
    search(supernet, None, SearchConfig(blocks=2), table, judge=judge, measure_ms=never)
    config = SearchConfig(macs=0.9)
    search(
        supernet,
        None,
        config,
        table,
        costs=dataclasses.replace(table, unit="MACs"),
        judge=judge,
        measure_ms=never,
    )


TABLE = make_table({f"b{i}": ["c"] for i in range(6)})


PREFIXES = [{path: "c" for path in list(TABLE.saved)[:count]} for count in range(1, 7)]


def within(sum_ms):
    """The first blocks pruned, fewest first, where that meets a sum."""
    found = [choices for choices in PREFIXES if TABLE.cost(choices) <= sum_ms]
    if not found:
        raise BudgetError("nothing meets it")
    return found


def unpruned(choices):
    return -len(choices)


def saving(times):
    """Latency by a rule: so many times what the table's sum says is saved."""
    return lambda choices: TABLE.whole - times * (TABLE.whole - TABLE.cost(choices))


def test_a_first_search_that_fails_says_so():
    with pytest.raises(BudgetError, match="nothing meets it"):
        find_measured(within, TABLE, 0.0, lambda choices: 1.0, len)


def test_what_cannot_be_reached_ends_with_the_fastest():
    """Merges that in truth save next to nothing: what was timed and saved most is kept."""
    limit_ms = TABLE.whole / 1.2
    timed = []

    def true(choices):
        timed.append(choices)
        return saving(0.01)(choices)

    (found,) = find_measured(within, TABLE, limit_ms, true, unpruned)
    assert found == max(timed, key=len)


@pytest.mark.parametrize("latency", [1.0, 1.1])
def test_merges_that_lose_end_the_search(latency):
    limit_ms = TABLE.whole / 1.2
    asked = []

    def find(sum_ms):
        asked.append(sum_ms)
        return within(sum_ms)

    (found,) = find_measured(find, TABLE, limit_ms, lambda c: latency * TABLE.whole, unpruned)
    assert found in PREFIXES
    assert len(asked) == 1


def test_of_those_within_the_budget_the_least_pruned_is_taken():
    limit_ms, true = TABLE.whole / 1.8, saving(1.5)
    (found,) = find_measured(within, TABLE, limit_ms, true, unpruned)
    assert true(found) <= 1.000001 * limit_ms
    assert true(dict(list(found.items())[:-1])) > 1.000001 * limit_ms
    assert len(found) < len(within(limit_ms)[0])


@pytest.mark.parametrize("times", [1.5, 1.0, 0.7])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_are_the_best_within_the_budget_whatever_sums_say(times, count):
    true = saving(times)
    limit_ms = true(PREFIXES[2])
    best = [choices for choices in PREFIXES if true(choices) <= limit_ms][:count]
    assert find_measured(within, TABLE, limit_ms, true, unpruned, count) == best
    assert len(best) == count


def test_fewer_than_asked_for_where_there_are_no_more():
    true = saving(1.0)
    limit_ms = true(PREFIXES[4])
    assert find_measured(within, TABLE, limit_ms, true, unpruned, 4) == PREFIXES[4:]


def test_what_the_sum_puts_a_little_beyond_the_budget_may_be_within_it():
    """One subnet whose blocks save more together than one by one, and that scores best."""
    limit_ms = TABLE.cost(PREFIXES[2])
    lucky = {**PREFIXES[0], "b5": "c"}
    table = dataclasses.replace(TABLE, saved={**TABLE.saved, "b5": {"c": 0.0}})
    table.saved["b5"]["c"] = TABLE.whole - 1.02 * limit_ms - TABLE.saved["b0"]["c"]
    assert limit_ms < table.cost(lucky) < 1.03 * limit_ms

    def find(sum_ms):
        return [choices for choices in [lucky, *PREFIXES[:5]] if table.cost(choices) <= sum_ms]

    def measured(choices):
        return 0.99 * limit_ms if choices == lucky else table.cost(choices)

    assert find_measured(find, table, limit_ms, measured, lambda c: c == lucky) == [lucky]


@pytest.mark.parametrize("count", [1, 2])
def test_no_more_is_timed_than_need_be(count):
    """The best first, and each once."""
    true, timed = saving(1.0), []

    def measured(choices):
        timed.append(len(choices))
        return true(choices)

    find_measured(within, TABLE, true(PREFIXES[1]), measured, unpruned, count)
    assert timed[:count] == [2, 3][:count]
    assert len(set(timed)) == len(timed) <= 2 * count


def test_the_budget_is_used_up():
    """The best by sums are far faster than was asked for, and others, which the sums put beyond, are within it."""
    coarse = [{"b0": "c", "b1": "c", "b2": "c"}, {"b1": "c", "b2": "c", "b3": "c"}]
    fine = [{"b4": "c"}, {"b5": "c"}]
    limit_ms = TABLE.cost(coarse[0])

    def find(sum_ms):
        return coarse if sum_ms < 1.08 * limit_ms else [*fine, *coarse]

    def measured(choices):
        return 0.9 * limit_ms if choices in coarse else limit_ms

    found = find_measured(find, TABLE, limit_ms, measured, lambda c: (c in fine, c == fine[0]), 2)
    assert found == fine
