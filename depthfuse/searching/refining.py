"""Subnets that are as fast as was asked for, as wholes and not by a sum.

What blocks save one by one does not add up exactly, and a search uses its budget up, so that an error of the sum is one
of the result: more is pruned than was asked for, or less. So the search looks a little beyond the budget, and what it
found is timed as a whole, the best first, until something is within. Where nothing is, or far less time is needed than
was asked for, it runs again for the sum that by these errors gives the latency asked for, on scores that are mostly
known.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable

from depthfuse.costs.table import CostTable
from depthfuse.errors import BudgetError
from depthfuse.searching.space import TOLERANCE, Choices
from depthfuse.spec import key_of

log = logging.getLogger(__name__)

_ATTEMPTS = 6
_BEYOND = 0.03  # how much more than the budget the first sum may be, relatively: sums err by about that
_BELOW = 0.03  # how far below the budget a measured latency may lie: pruned more than was asked for
_SPARE = 3  # subnets beyond the budget that are timed in one attempt, beside those that are wanted


def find_measured(
    find: Callable[[float], list[Choices]],
    table: CostTable,
    limit_ms: float,
    measure_ms: Callable[[Choices], float],
    value: Callable[[Choices], float],
    count: int = 1,
) -> list[Choices]:
    """Of the subnets found whose measured latency is within `limit_ms` the `count` best, best first; fewer where there
    are no more, and the fastest alone where there is none.

    Args:
        find: budget in milliseconds, as sums of `table` count them -> subnets within it, best first. Raises BudgetError
            where there is none.
        measure_ms: latency of a subnet, as a whole. value: what makes a subnet the best: more is better.

    Raises BudgetError where the first search does.
    """
    timed: dict[str, tuple[float, Choices]] = {}
    most_ms = limit_ms * (1 + TOLERANCE)
    sum_ms = (1 + _BEYOND) * limit_ms
    # sums whose subnets were within the budget, and whose were not; neither is known yet
    met_ms, missed_ms = 0.0, math.inf
    for attempt in range(_ATTEMPTS):
        try:
            ranked = find(sum_ms)
        except BudgetError:
            if not attempt:
                raise
            break
        known = len(timed)
        here = _time_until(ranked, timed, measure_ms, most_ms, count)
        within_ms = [latency_ms for latency_ms, _ in here if latency_ms <= most_ms]
        enough = len(within_ms) == count
        if enough and statistics.median(within_ms) >= (1 - _BELOW) * limit_ms:
            break
        if len(timed) == known and any(latency_ms <= most_ms for latency_ms, _ in timed.values()):
            break  # all that it finds is known
        errors = [
            (table.whole - table.cost(choices)) / (table.whole - latency_ms)
            for latency_ms, choices in here
            if latency_ms < table.whole and table.cost(choices) < table.whole
        ]
        if not errors:
            break
        if len(within_ms) == len(here) or enough:
            met_ms = max(met_ms, sum_ms)
        else:
            missed_ms = min(missed_ms, sum_ms)
        error = statistics.median(errors)
        sum_ms = table.whole - (table.whole - limit_ms) * error
        if not met_ms < sum_ms < missed_ms:  # other subnets err in another way
            if met_ms and missed_ms < math.inf:
                sum_ms = (met_ms + missed_ms) / 2
            else:
                sum_ms = (1 + _BEYOND) * met_ms if met_ms else (1 - _BELOW) * missed_ms
        log.info(
            "%d of the %d best subnets that were found are within %.4g ms; they save %.2f of what the sum of their "
            "blocks says: the search runs again, for a sum of %.4g ms",
            len(within_ms),
            len(here),
            limit_ms,
            1 / error,
            sum_ms,
        )
    within = [choices for latency_ms, choices in timed.values() if latency_ms <= most_ms]
    if not within:
        return [min(timed.values(), key=lambda row: row[0])[1]]
    return sorted(within, key=value, reverse=True)[:count]


def _time_until(
    ranked: list[Choices],
    timed: dict[str, tuple[float, Choices]],
    measure_ms: Callable[[Choices], float],
    most_ms: float,
    count: int,
) -> list[tuple[float, Choices]]:
    """Time subnets in their order until `count` are within `most_ms`, or too many were not: [(latency, choices)] of all
    that were looked at, which go to `timed`, too."""
    here: list[tuple[float, Choices]] = []
    fresh = 0
    for choices in ranked:
        if sum(latency_ms <= most_ms for latency_ms, _ in here) == count or fresh == count + _SPARE:
            break
        key = key_of(choices)
        if key not in timed:
            timed[key] = measure_ms(choices), choices
            fresh += 1
        here.append(timed[key])
    return here
