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
from depthfuse.searching.space import Choices
from depthfuse.searching.strategies import key_of

log = logging.getLogger(__name__)

_ATTEMPTS = 4
_ABOVE, _BELOW = (
    0.01,
    0.03,
)  # how far from the budget a measured latency may lie, relatively: noise, and too fast


def find_measured(
    find: Callable[[float], Choices],
    table: CostTable,
    limit_ms: float,
    measure_ms: Callable[[Choices], float],
) -> Choices:
    """The subnet whose measured latency comes nearest to `limit_ms` from below; the fastest where none does.

    Args:
        find: budget in milliseconds, as sums of `table` count them -> the best subnet within it. Raises BudgetError
            where there is none.
        measure_ms: latency of a subnet, as a whole.

    Raises BudgetError where the first search does.
    """
    tried: dict[str, tuple[float, Choices]] = {}
    sum_ms = limit_ms
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
        if (1 - _BELOW) * limit_ms <= latency_ms <= (1 + _ABOVE) * limit_ms:
            break
        saved_ms, promised_saving_ms = table.whole - latency_ms, table.whole - promised_ms
        if saved_ms <= 0 or promised_saving_ms <= 0:
            break
        sum_ms = table.whole - (table.whole - limit_ms) * promised_saving_ms / saved_ms
        log.info(
            "the subnet that was found takes %.4g ms; by the sum of what its blocks save it would take %.4g, and at "
            "most %.4g are asked for: the search runs again, for a sum of %.4g",
            latency_ms,
            promised_ms,
            limit_ms,
            sum_ms,
        )
    within = [row for row in tried.values() if row[0] <= (1 + _ABOVE) * limit_ms]
    return (
        max(within, key=lambda row: row[0])[1] if within else min(tried.values(), key=lambda row: row[0])[1]
    )
