"""From a trained supernet to a subnet: evolutionary search under a block-count or latency budget.

As in SPOS (Guo et al., ECCV 2020): each generation keeps the best subnets as parents and fills up with crossovers and
mutations that meet the budget. Every subnet is scored on held-out training images after re-calibration. Scores go to
a journal as they come, and all draws are seeded, so a search that was killed repeats its steps from the journal and
goes on to the same answer.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from depthfuse.config import SearchConfig
from depthfuse.costs import CostTable
from depthfuse.data import DataBundle
from depthfuse.log import progress
from depthfuse.spec import KEEP, SubnetSpec
from depthfuse.supernet import Supernet
from depthfuse.train import calibrate, top1

log = logging.getLogger(__name__)

Choices = dict[str, str]  # {block path: candidate} of the pruned blocks


class BudgetError(ValueError):
    """A budget that no subnet meets, or that is not stated once."""


def check_one_budget(config: SearchConfig) -> None:
    """Raise BudgetError unless exactly one budget is set."""
    stated = {name: getattr(config, name) for name in ("blocks", "budget_ms", "speedup")}
    given = [f"{name}={value}" for name, value in stated.items() if value is not None]
    if len(given) != 1:
        raise BudgetError(
            f"state exactly one budget: search.blocks, search.budget_ms or search.speedup; got {given or 'none'}"
        )


class SearchSpace:
    """Which subnets are allowed: the options of each block, and the budget."""

    def __init__(self, supernet: Supernet, config: SearchConfig, latency: CostTable | None = None):
        check_one_budget(config)
        self.options = supernet.options()
        if latency is not None and not config.losing_merges:
            self.options = {path: latency.paying(path) for path in self.options}
            losing = [path for path, names in self.options.items() if not names]
            if losing:
                log.info("merging is no faster than keeping in %s: left out", ", ".join(losing))
        self.options = {path: names for path, names in self.options.items() if names}
        self.latency = latency
        self.blocks = config.blocks
        self.budget_ms = config.budget_ms
        if self.blocks is not None:
            if not 1 <= self.blocks <= len(self.options):
                raise BudgetError(
                    f"asked to prune {self.blocks} blocks; possible: 1 to {len(self.options)} "
                    "(merges that do not pay on this device are left out unless losing merges are allowed)"
                )
            return
        if latency is None:
            raise BudgetError("a latency budget needs a latency table")
        if config.speedup is not None:
            self.budget_ms = latency.whole / config.speedup
        fastest = {
            path: max(names, key=lambda n: latency.saved[path][n]) for path, names in self.options.items()
        }
        fastest_ms = latency.cost(fastest)
        if fastest_ms > self.budget_ms:
            raise BudgetError(
                f"no subnet runs in {self.budget_ms:.3f} ms: the fastest reachable takes {fastest_ms:.3f} ms, "
                f"{latency.whole / fastest_ms:.2f}x over the accelerated baseline ({latency.whole:.3f} ms)"
            )

    def meets_budget(self, choices: Choices) -> bool:
        if self.blocks is not None:
            return len(choices) == self.blocks
        return self.latency.cost(choices) <= self.budget_ms

    def repair(self, choices: Choices, rng: random.Random) -> Choices:
        """Change a subnet at random places until it meets the budget and prunes no more than it must."""
        choices = dict(choices)
        kept = [path for path in self.options if path not in choices]
        pruned = list(choices)
        rng.shuffle(kept)
        rng.shuffle(pruned)
        if self.blocks is not None:
            for path in pruned[self.blocks :]:
                del choices[path]
            while len(choices) < self.blocks:
                path = kept.pop()
                choices[path] = rng.choice(self.options[path])
            return self._ordered(choices)
        while not self.meets_budget(choices):
            if kept:
                path = kept.pop()
                choices[path] = rng.choice(self.options[path])
            else:  # everything is pruned: take faster candidates
                path = pruned.pop() if pruned else rng.choice(list(choices))
                choices[path] = max(self.options[path], key=lambda n: self.latency.saved[path][n])
        for path in rng.sample(list(choices), len(choices)):
            without = {p: c for p, c in choices.items() if p != path}
            if self.meets_budget(without):
                choices = without
        return self._ordered(choices)

    def _ordered(self, choices: Choices) -> Choices:
        return {path: choices[path] for path in self.options if path in choices}

    def mutate(self, choices: Choices, chance: float, rng: random.Random) -> Choices:
        changed = dict(choices)
        for path, names in self.options.items():
            if rng.random() < chance:
                new = rng.choice([KEEP, *names])
                changed.pop(path, None)
                if new != KEEP:
                    changed[path] = new
        return self.repair(changed, rng)

    def cross(self, a: Choices, b: Choices, rng: random.Random) -> Choices:
        child = {}
        for path in self.options:
            name = rng.choice((a, b)).get(path, KEEP)
            if name != KEEP:
                child[path] = name
        return self.repair(child, rng)


class Journal:
    """Scores by subnet, appended to a file as they come. A line cut short by a crash is dropped."""

    def __init__(self, path: Path | None):
        self.path = path
        self.scores: dict[str, float] = {}
        if path is not None and path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                os.truncate(path, len(whole.encode()))
            for line in whole.splitlines():
                row = json.loads(line)
                self.scores[self.key(row["choices"])] = row["top1"]

    @staticmethod
    def key(choices: Mapping[str, str]) -> str:
        return json.dumps(dict(choices), sort_keys=True)

    def add(self, choices: Choices, score: float) -> None:
        self.scores[self.key(choices)] = score
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"choices": choices, "top1": score}) + "\n")
                file.flush()
                os.fsync(file.fileno())


def search(
    supernet: Supernet,
    data: DataBundle | None,
    config: SearchConfig,
    latency: CostTable | None = None,
    *,
    seed: int = 0,
    journal: Path | None = None,
    score: Callable[[Choices], float] | None = None,
) -> SubnetSpec:
    """The best subnet found within the budget of `config`.

    A subnet's score is its top-1 on the held-out training images of `data` after re-calibration, unless `score` is
    given. With `journal`, an interrupted search goes on where it was. Raises BudgetError for a budget below the
    fastest subnet (the message names that one).
    """
    space = SearchSpace(supernet, config, latency)
    book = Journal(journal)
    rng = random.Random(seed)

    def measure(choices: Choices) -> float:
        if score is not None:
            return score(choices)
        supernet.set_choices(choices)
        calibrate(supernet, data, config.calibration_images)
        return top1(supernet, data.holdout_loader())

    def rank(choices: Choices) -> tuple[float, float, str]:
        key = book.key(choices)
        cost = latency.cost(choices) if latency is not None else len(choices)
        return -book.scores[key], cost, key

    population = _distinct(lambda: space.repair({}, rng), config.population)
    total = config.population * (config.generations + 1)
    with progress("search", total=total) as bar:
        for generation in range(config.generations + 1):
            for choices in population:
                if book.key(choices) not in book.scores:
                    book.add(choices, measure(choices))
                bar.advance(best=max(book.scores.values()))
            if generation == config.generations:
                break
            parents = sorted(population, key=rank)[: config.parents]

            def child(parents: list[Choices] = parents) -> Choices:
                if rng.random() < 0.5:
                    return space.cross(rng.choice(parents), rng.choice(parents), rng)
                return space.mutate(rng.choice(parents), config.mutation, rng)

            population = _distinct(child, config.population, parents)
    best = min(population, key=rank)
    log.info("search: %d subnets scored, best %.2f %%", len(book.scores), book.scores[book.key(best)])
    supernet.set_choices(best)
    return supernet.spec()


def _distinct(draw: Callable[[], Choices], count: int, start: list[Choices] | None = None) -> list[Choices]:
    """Up to `count` different subnets; fewer where the space holds no more."""
    found = {Journal.key(choices): choices for choices in start or []}
    for _ in range(20 * count):
        if len(found) >= count:
            break
        choices = draw()
        found.setdefault(Journal.key(choices), choices)
    return list(found.values())
