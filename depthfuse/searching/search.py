"""From a trained supernet to a subnet within a budget, and to the Pareto front of accuracy over cost.

A strategy (`strategies.py`) proposes subnets of a space (`space.py`); each is scored on held-out training images after
re-calibration. Scores go to a journal as they come, and all draws are seeded, so a search that was killed repeats its
steps from the journal and goes on to the same answer.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from depthfuse.config import SearchConfig
from depthfuse.costs.table import CostTable
from depthfuse.data import DataBundle
from depthfuse.log import progress
from depthfuse.merging.supernet import Supernet
from depthfuse.searching.choosing import ranked, unpruned
from depthfuse.searching.intervals import Paired, points_lost, wilson
from depthfuse.searching.journal import Journal
from depthfuse.searching.refining import find_measured
from depthfuse.searching.scoring import Scorer, SubnetScore, value_of
from depthfuse.searching.space import Choices, SearchSpace
from depthfuse.searching.strategies import find_strategy, pareto
from depthfuse.spec import SubnetSpec
from depthfuse.tasks import CLASSIFICATION, Task
from depthfuse.training.evaluation import Score, calibrate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One subnet on the front. cost: in the unit of the cost table. score: on held-out images. pair: beside the
    unpruned net, where the score is a share of images."""

    choices: Choices
    cost: float
    score: SubnetScore
    pair: Paired | None = None

    @property
    def top1(self) -> float:
        """The task's metric in percent."""
        return self.score.top1


@dataclass(frozen=True)
class SearchResult:
    """spec: the best subnet within the budget; None without one. front: what nothing scored beats in both score and
    cost, cheapest first. scored: how many subnets were. unpruned: the metric of the unpruned net, in percent.
    finalists: the best subnets within the budget, as many as were asked for, that of `spec` first."""

    spec: SubnetSpec | None
    front: tuple[Point, ...]
    scored: int
    unpruned: float | None = None
    finalists: tuple[Choices, ...] = ()


def search(
    supernet: Supernet,
    data: DataBundle | None,
    config: SearchConfig,
    latency: CostTable | None = None,
    *,
    costs: CostTable | None = None,
    seed: int = 0,
    journal: Path | None = None,
    judge: Callable[[Choices], Score] | None = None,
    settle: Callable[[], None] | None = None,
    task: Task = CLASSIFICATION,
    measure_ms: Callable[[Choices], float] | None = None,
) -> SearchResult:
    """The best subnet found within the budget of `config`, and the front.

    A subnet is scored on the held-out training images of `data` after re-calibration, unless `judge` is given.

    Args:
        latency: decides which merges pay, and is the cost axis of the front.
        costs: in the unit of the budget, where that is not milliseconds or blocks.
        measure_ms: latency of a subnet as a whole, on the machine that `latency` was measured on. With it a budget in
            milliseconds, or a speed-up, holds for that, see `refining.py`; without, for the table's sums.
        settle: what is done with the batch norms of the chosen subnet, in the place of re-calibration.
        journal: with it, an interrupted search goes on where it was.

    Raises BudgetError for a budget below the cheapest subnet (the message names that one), one that nothing scored
    meets (it names what comes nearest), and an unknown strategy.
    """
    strategy = find_strategy(config.strategy)
    forms = supernet.forms()
    space = SearchSpace(supernet.options(), config, costs or latency, latency, forms)
    left_out = [path for path in supernet.options() if path not in space.options]
    if left_out:
        log.info("excluded, or merging is no faster than keeping: %s", ", ".join(left_out))
    book = Journal(journal)

    value = functools.partial(value_of, metric=config.metric)
    wanted = config.metric == "divergence"
    settle = settle or functools.partial(calibrate, supernet, data, config.calibration_images)
    scorer = Scorer(supernet, data, settle, task, wanted) if judge is None else None

    def judged(choices: Choices) -> tuple[SubnetScore, Paired | None]:
        return scorer(choices) if scorer is not None else (SubnetScore(*judge(choices)), None)

    with progress("search", total=strategy.count(space, config)) as bar:

        def score(choices: Choices) -> float:
            known = book.get(choices)
            if known is None or (wanted and known.divergence is None):  # scored by another metric before
                known, pair = judged(choices)
                book.add(choices, known, pair)
                bar.advance(**{task.key: known.top1})
            return value(known)

        if config.strategy != "pick":
            score({})  # what all others are compared with
        axis = latency or costs

        def find(space: SearchSpace) -> list[Choices]:
            strategy.run(space, score, config, random.Random(seed))
            return ranked(space, list(book.rows.values()), value, axis) if space.unit is not None else []

        # where a loss is allowed, the cheapest net within it is asked for, and no other
        count = 1 if space.points is not None else config.finalists

        def find_within(sum_ms: float) -> list[Choices]:
            within = dataclasses.replace(config, speedup=None, budget_ms=sum_ms)
            return find(SearchSpace(supernet.options(), within, latency, latency, forms))

        if measure_ms is None or space.unit != "ms" or latency is None:
            best = find(space)[:count]
        else:
            best = find_measured(
                find_within, latency, space.limit, measure_ms, lambda choices: value(book.get(choices)), count
            )
    spec = None
    if space.unit is not None:
        supernet.set_choices(best[0])
        spec = supernet.spec()
        top1 = book.get(best[0]).top1
        log.info("search: %d subnets scored, best %s %.2f %%", len(book.rows), task.metric, top1)
    return dataclasses.replace(found_in(book, axis, config, spec), finalists=tuple(best))


def found_in(
    book: Journal, axis: CostTable | None, config: SearchConfig, spec: SubnetSpec | None = None
) -> SearchResult:
    """What a search has found so far, from its journal.

    axis: the cost of the front; without, the number of pruned blocks.
    """
    rows = list(book.rows.values())
    points = [
        Point(choices, axis.cost(choices) if axis else len(choices), score, book.pair(choices))
        for choices, score in rows
    ]
    front = pareto([(p.cost, value_of(p.score, config.metric), p) for p in points])
    whole = unpruned(rows)
    return SearchResult(spec, tuple(front), len(rows), None if whole is None else whole.top1)


def front_csv(result: SearchResult, table: CostTable | None, task: Task = CLASSIFICATION) -> str:
    """The front as CSV, one subnet a line; cells of intervals are empty where the score is no share of images.

    low, high: 95 % intervals (`depthfuse.searching.intervals`), of the score and of the points lost against the
    unpruned net on the same images.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    unit, key = table.unit if table else "blocks", task.key
    writer.writerow(
        [
            *(f"cost_{unit}", "speedup", f"{key}_holdout", f"{key}_low", f"{key}_high"),
            *("points_lost", "points_lost_low", "points_lost_high"),
            *("loss_holdout", "divergence_holdout", "images_holdout", "blocks", "choices"),
        ]
    )
    for p in result.front:
        ratio = f"{table.whole / p.cost:.4f}" if table else ""
        choices = " ".join(f"{path}={name}" for path, name in p.choices.items())
        sure = (*wilson(p.top1, p.pair.images), *points_lost(p.pair)) if p.pair else ()
        cells = [f"{number:.3f}" for number in sure] or [""] * 5
        images = p.pair.images if p.pair else ""
        writer.writerow(
            [
                f"{p.cost:.6g}",
                ratio,
                f"{p.top1:.3f}",
                *cells,
                f"{p.score.loss:.5f}",
                "" if p.score.divergence is None else f"{p.score.divergence:.5f}",
                images,
                len(p.choices),
                choices,
            ]
        )
    return out.getvalue()
