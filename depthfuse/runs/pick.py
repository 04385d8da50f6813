"""One net from what a finished search has scored: fine-tuned, merged and compared, and nothing else is done again."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from depthfuse.config import PruneConfig, SearchConfig, load_yaml
from depthfuse.costs.table import CostTable
from depthfuse.errors import BudgetError, ConfigError
from depthfuse.runs.run import Run, prune
from depthfuse.searching.choosing import nearest, offer, ranked, unpruned
from depthfuse.searching.journal import Journal
from depthfuse.searching.scoring import value_of
from depthfuse.searching.space import SearchSpace
from depthfuse.searching.strategies import pareto

# The wishes of `pick`, and all other budgets, which the search itself may have had.
WISHES = ("speedup", "points", "blocks")
_NONE = dict.fromkeys((*WISHES, "budget_ms", "macs", "parameters"))


def pick(
    folder: Path,
    *,
    speedup: float | None = None,
    points: float | None = None,
    blocks: int | None = None,
    out: Path | None = None,
) -> Run:
    """Take a net from a run's search and bring it to its report, by that run's settings.

    Stopped anywhere and called again, it goes on and ends with the same bits.

    Args:
        folder: of a run whose search is done (`depthfuse search`).
        speedup: at least, over the accelerated baseline: the best net within it is taken.
        points: lost against the unpruned net on the held-out images, before fine-tuning, at most: the fastest net
            within it is taken.
        blocks: exactly so many are pruned: the best net of those is taken.
        out: default: a folder in `folder`, named by the wish.

    Raises:
        ConfigError: a folder without a finished search, or not exactly one wish. BudgetError: nothing that was scored
            meets the wish; the message names what comes nearest.
    """
    if not (folder / "front.csv").exists():
        raise ConfigError(
            f"{folder} holds no finished search (front.csv): run `depthfuse search ... --out {folder}` first"
        )
    wishes = dict(zip(WISHES, (speedup, points, blocks), strict=True))
    given = {name: value for name, value in wishes.items() if value is not None}
    config: PruneConfig = load_yaml(folder / "config.yaml", complete=True)
    table = CostTable.load(folder / "latency.json")
    rows = list(Journal(folder / "search.jsonl").rows.values())
    if len(given) != 1:
        told = "; ".join(_front(rows, table))
        got = " and ".join(f"{name}={value:g}" for name, value in given.items()) or "none"
        raise ConfigError(f"state exactly one of {', '.join(WISHES)}; got {got}. {folder} offers: {told}")
    ((name, value),) = given.items()
    search = dataclasses.replace(config.search, **{**_NONE, **given}, strategy="pick")
    _check(search, rows, table)  # before a folder is made, and data opened
    out = folder / f"pick-{name}-{value:g}" if out is None else out
    return prune(dataclasses.replace(config, out=out, start_from=folder, search=search))


def _check(search: SearchConfig, rows: list, table: CostTable) -> None:
    """Raise BudgetError, naming what comes nearest, unless something that was scored meets the wish."""
    options = {path: list(names) for path, names in table.saved.items()}
    try:
        space = SearchSpace(options, search, table, table)
    except BudgetError as error:  # beyond what any net can be
        without = dataclasses.replace(search, **_NONE)
        told = nearest(SearchSpace(options, without, table, table), rows, table)
        raise BudgetError(f"{error}{told}") from error
    ranked(space, rows, functools.partial(value_of, metric=search.metric), table)


def _front(rows: list, table: CostTable) -> list[str]:
    """The pruned nets that nothing scored beats, in words, the fastest first."""
    points = [(table.cost(choices), score.top1, (choices, score)) for choices, score in rows if choices]
    return [offer(choices, score, unpruned(rows), table) for choices, score in pareto(points)]
