"""A subnet that is as fast as was asked for, as a whole and not by a sum.

What blocks save one by one does not add up exactly, and a search uses its budget up, so that an error of the sum is one
of the result: more is pruned than was asked for, or less. Here what a search finds is timed as a whole; where the sum
errs, the search runs again for the sum that by this error gives the latency asked for, on scores that are mostly known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from depthfuse.costs.table import CostTable
from depthfuse.errors import BudgetError
from depthfuse.searching.space import TOLERANCE, Choices
from depthfuse.spec import key_of

log = logging.getLogger(__name__)

_ATTEMPTS = 6
_BELOW = (
    0.03  # how far below the budget a measured latency may lie, relatively: pruned more than was asked for
)


def find_measured(
    find: Callable[[float], Choices],
    table: CostTable,
    limit_ms: float,
    measure_ms: Callable[[Choices], float],
    value: Callable[[Choices], float],
) -> Choices:
    """Of the subnets found whose measured latency is within `limit_ms` the best; the fastest where none is.

    Args:
        find: budget in milliseconds, as sums of `table` count them -> the best subnet within it. Raises BudgetError
            where there is none.
        measure_ms: latency of a subnet, as a whole. value: what makes a subnet the best: more is better.

    Raises BudgetError where the first search does.
    """
    tried: dict[str, tuple[float, Choices]] = {}
    sum_ms = limit_ms
    met_ms, missed_ms = 0.0, table.whole  # a sum whose subnet was within the budget, and one that was beyond
    for attempt in range(_ATTEMPTS):
        try:
            choices = find(sum_ms)
        except BudgetError:
            if not attempt:
                raise
            break
        if key_of(choices) in tried:
            break
        latency_ms, promised_ms = measure_ms(choices), table.cost(choices)
        tried[key_of(choices)] = latency_ms, choices
        if (1 - _BELOW) * limit_ms <= latency_ms <= (1 + TOLERANCE) * limit_ms:
            break
        saved_ms, promised_saving_ms = table.whole - latency_ms, table.whole - promised_ms
        if saved_ms <= 0 or promised_saving_ms <= 0:
            break
        if latency_ms <= (1 + TOLERANCE) * limit_ms:
            met_ms = max(met_ms, sum_ms)
        else:
            missed_ms = min(missed_ms, promised_ms)
        sum_ms = table.whole - (table.whole - limit_ms) * promised_saving_ms / saved_ms
        if not met_ms < sum_ms < missed_ms:  # another subnet errs in another way
            sum_ms = (met_ms + missed_ms) / 2
        log.info(
            "the subnet that was found takes %.4g ms; by the sum of what its blocks save it would take %.4g, and at "
            "most %.4g are asked for: the search runs again, for a sum of %.4g",
            latency_ms,
            promised_ms,
            limit_ms,
            sum_ms,
        )
    within = [choices for latency_ms, choices in tried.values() if latency_ms <= (1 + TOLERANCE) * limit_ms]
    return max(within, key=value) if within else min(tried.values(), key=lambda row: row[0])[1]
