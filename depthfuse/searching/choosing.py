"""What was scored within a budget, the best first, and, where nothing meets it, what comes nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from depthfuse.costs.table import CostTable
from depthfuse.errors import BudgetError
from depthfuse.searching.scoring import SubnetScore
from depthfuse.searching.space import Choices, SearchSpace
from depthfuse.spec import key_of

Row = tuple[Choices, SubnetScore]
_OFFERS = 3
_ROUNDING = 1e-9  # of sums of percentages


def ranked(
    space: SearchSpace, rows: Sequence[Row], value: Callable[[SubnetScore], float], axis: CostTable | None
) -> list[Choices]:
    """The subnets within the budget, that of most value first; where it is a loss in points, the cheapest first. Of
    those that are of the same form, block by block, only the first.

    Args:
        rows: all that was scored. axis: the table that offers are told by, in milliseconds or another unit.

    Raises:
        BudgetError: nothing meets the budget; the message names what comes nearest.
    """
    known = [(choices, score) for choices, score in rows if choices and space.allows(choices)]
    if space.points is not None:
        whole = unpruned(rows)
        if whole is None:
            raise BudgetError(
                "a loss in points is against the unpruned net, which this search has not scored (an earlier version "
                "did not): search again in another folder"
            )
        least = whole.top1 - space.points - _ROUNDING
        known = [(choices, score) for choices, score in known if score.top1 >= least]
        order = [(space.cost(c), -value(s), key_of(c), c) for c, s in known]
    else:
        order = [(-value(s), space.cost(c), key_of(c), c) for c, s in known]
    if not order:
        raise BudgetError(
            f"none of the {len(rows)} scored subnets meets the budget{nearest(space, rows, axis)}"
        )
    first: dict[frozenset[tuple[str, str]], Choices] = {}
    for *_, choices in sorted(order, key=lambda row: row[:3]):
        form = frozenset((path, space.form(path, name)) for path, name in choices.items())
        first.setdefault(form, choices)
    return list(first.values())


def unpruned(rows: Sequence[Row]) -> SubnetScore | None:
    """The score of the unpruned net, if it is among them."""
    return next((score for choices, score in rows if not choices), None)


def nearest(space: SearchSpace, rows: Sequence[Row], axis: CostTable | None) -> str:
    """The scored subnets that miss a budget by least, for the end of a sentence; nothing where there are none."""
    pruned = [(choices, score) for choices, score in rows if choices]

    def miss(row: Row) -> tuple[float, float]:
        choices, score = row
        if space.points is not None:
            return -score.top1, space.cost(choices)
        if space.blocks is not None:
            return abs(len(choices) - space.blocks), -score.top1
        return space.cost(choices), -score.top1

    best = sorted(pruned, key=miss)[:_OFFERS]
    told = "; ".join(offer(choices, score, unpruned(rows), axis) for choices, score in best)
    return f". Nearest: {told}" if told else ""


def offer(choices: Choices, score: SubnetScore, whole: SubnetScore | None, axis: CostTable | None) -> str:
    """A subnet in words: "3 blocks, 1.21x faster, loses 0.80 points"."""
    words = [f"{len(choices)} block{'s' if len(choices) > 1 else ''}"]
    if axis is not None:
        ratio = axis.whole / axis.cost(choices)
        words.append(f"{ratio:.2f}x faster" if axis.unit == "ms" else f"{1 / ratio:.2f} of the {axis.unit}")
    if whole is not None:
        lost = whole.top1 - score.top1
        words.append(f"{'loses' if lost >= 0 else 'gains'} {abs(lost):.2f} points")
    return ", ".join(words)
