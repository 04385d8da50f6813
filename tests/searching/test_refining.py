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

    config = SearchConfig(**budget)
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
    config = SearchConfig(**budget)
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


def prefix_within(sum_ms):
    """The fewest of the first blocks that meet a sum."""
    choices = {}
    for path in TABLE.saved:
        if TABLE.cost(choices) <= sum_ms:
            return choices
        choices[path] = "c"
    if TABLE.cost(choices) <= sum_ms:
        return choices
    raise BudgetError("nothing meets it")


def unpruned(choices):
    return -len(choices)


def test_a_first_search_that_fails_says_so():
    with pytest.raises(BudgetError, match="nothing meets it"):
        find_measured(prefix_within, TABLE, 0.0, lambda choices: 1.0, len)


def test_what_cannot_be_reached_ends_with_the_fastest(supernet):
    """Merges that in truth save next to nothing: the corrected sum is beyond the space, and what was found is kept."""
    limit_ms = TABLE.whole / 1.2
    assert find_measured(prefix_within, TABLE, limit_ms, lambda c: TABLE.whole - 0.01 * len(c), unpruned) == (
        prefix_within(limit_ms)
    )


@pytest.mark.parametrize("latency", [1.0, 1.1])
def test_merges_that_lose_end_the_search(latency):
    limit_ms = TABLE.whole / 1.2
    found = find_measured(prefix_within, TABLE, limit_ms, lambda c: latency * TABLE.whole, unpruned)
    assert found == prefix_within(limit_ms)


def test_of_those_within_the_budget_the_least_pruned_is_taken():
    limit_ms = TABLE.whole / 1.8

    def true(choices):
        return TABLE.whole - 1.5 * (TABLE.whole - TABLE.cost(choices))

    found = find_measured(prefix_within, TABLE, limit_ms, true, unpruned)
    assert true(found) <= 1.000001 * limit_ms
    assert true(dict(list(found.items())[:-1])) > 1.000001 * limit_ms
    assert len(found) < len(prefix_within(limit_ms))
