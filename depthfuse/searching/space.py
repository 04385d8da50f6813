"""Which subnets a search may choose among: the candidates of each block, and the budget."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Mapping

from depthfuse.config import SearchConfig
from depthfuse.costs.table import CostTable
from depthfuse.errors import BudgetError
from depthfuse.spec import KEEP

Choices = dict[str, str]  # {block path: candidate} of the pruned blocks
Level = float  # a budget: most blocks' worth of cost, or the exact number of pruned blocks

# what a subnet may cost beyond its budget, relatively: sums of floats and solvers are no more exact
TOLERANCE = 1e-6

_UNITS = {
    **{"blocks": "blocks", "budget_ms": "ms", "speedup": "ms", "macs": "MACs", "parameters": "parameters"},
    "points": "points",
}


def budget_unit(config: SearchConfig) -> str | None:
    """The unit of the one budget that is set, or None. Raises BudgetError for several, and for points, which are known
    of scored subnets only, with a strategy that is to score."""
    given = [name for name in _UNITS if getattr(config, name) is not None]
    if len(given) > 1:
        stated = ", ".join(f"{name}={getattr(config, name)}" for name in given)
        raise BudgetError(
            f"state exactly one budget: search.{', search.'.join(_UNITS)}; got {stated}: several"
        )
    if config.points is not None and config.strategy != "pick":
        raise BudgetError(
            f"search.points={config.points:g} picks among subnets that were scored before: run `depthfuse search` "
            "without a budget, and then `depthfuse pick RUN --points P`"
        )
    return _UNITS[given[0]] if given else None


def check_one_budget(config: SearchConfig) -> None:
    """Raise BudgetError unless exactly one budget is set."""
    if budget_unit(config) is None:
        raise BudgetError(f"state exactly one budget: search.{', search.'.join(_UNITS)}; got none")


class SearchSpace:
    """The allowed subnets.

    Args:
        options: {block path: names of its candidates}, in order.
        costs: in the unit of the budget. With a budget in blocks it may be missing.
        latency: what decides which merges pay; default `costs`.
        forms: {block path: {candidate: form}}, as `Supernet.forms` gives them; default: each candidate has its own.

    Raises BudgetError for a budget that nothing meets (it names the cheapest subnet), and for blocks to force or
    exclude that are not there; CostError for a table by which subnets would cost nothing or less.
    """

    def __init__(
        self,
        options: Mapping[str, list[str]],
        config: SearchConfig,
        costs: CostTable | None = None,
        latency: CostTable | None = None,
        forms: Mapping[str, Mapping[str, str]] | None = None,
    ):
        self.costs, self._forms = costs, forms or {}
        self.unit = budget_unit(config)
        excluded = _named_blocks(options, config.exclude, "exclude")
        self.forced: dict[str, list[str]] = {}
        for path, names in _named_blocks(options, config.force, "force").items():
            self.forced[path] = [name for name in names if name not in excluded.get(path, ())]
            if not self.forced[path]:
                raise BudgetError(f"block {path} is both forced and excluded")
        latency = latency or costs
        for table in (costs, latency):
            if table is not None:
                table.check_plausible(f"of {table.conditions.get('model')}")
        self.options: dict[str, list[str]] = {}
        for path, names in options.items():
            allowed = [name for name in names if name not in excluded.get(path, ())]
            if path in self.forced:
                allowed = self.forced[path]
            elif latency is not None and not config.losing_merges:
                allowed = [name for name in latency.paying(path) if name in allowed]
            if allowed:
                self.options[path] = allowed
        self.blocks, self.points = config.blocks, config.points
        self.limit: float | None = None
        if self.blocks is not None:
            least = max(1, len(self.forced))
            if not least <= self.blocks <= len(self.options):
                raise BudgetError(
                    f"asked to prune {self.blocks} blocks; possible: {least} to {len(self.options)} "
                    "(merges that do not pay on this device are left out unless losing merges are allowed)"
                )
            return
        if costs is None:
            raise BudgetError("a budget other than a number of blocks, or none, needs a table of costs")
        if config.speedup is not None:
            self.limit = costs.whole / config.speedup
        elif config.budget_ms is not None:
            self.limit = config.budget_ms
        elif self.unit in ("MACs", "parameters"):  # a share
            self.limit = costs.whole * (config.macs if self.unit == "MACs" else config.parameters)
        # what was measured as a whole counts for more than a sum
        least_cost = max(costs.cost(self.cheapest()), costs.floor or 0.0)
        if self.limit is not None and least_cost > self.limit * (1 + TOLERANCE):
            raise BudgetError(
                f"no subnet costs {self.limit:.4g} {costs.unit} or less: the fastest reachable takes {least_cost:.4g}, "
                f"{costs.whole / least_cost:.2f}x less than the accelerated baseline ({costs.whole:.4g} {costs.unit})"
            )

    def cheapest(self) -> Choices:
        """The subnet of least cost."""
        assert self.costs is not None
        saved = self.costs.saved
        best = {path: max(names, key=lambda n: saved[path][n]) for path, names in self.options.items()}
        return {path: name for path, name in best.items() if path in self.forced or saved[path][name] > 0}

    def levels(self, count: int) -> list[Level]:
        """The budget; without one, `count` budgets from the cheapest subnet up, the whole model left out."""
        if self.blocks is not None:
            return [self.blocks]
        if self.limit is not None:
            return [self.limit]
        assert self.costs is not None
        least = self.costs.cost(self.cheapest())
        return [least + (self.costs.whole - least) * i / count for i in range(count)]

    def cost(self, choices: Choices) -> float:
        return self.costs.cost(choices) if self.costs is not None else len(choices)

    def meets(self, choices: Choices, level: Level) -> bool:
        if any(choices.get(path) not in names for path, names in self.forced.items()):
            return False
        if self.blocks is not None:
            return len(choices) == level
        return self.cost(choices) <= level * (1 + TOLERANCE)

    def allows(self, choices: Choices) -> bool:
        """Whether a subnet is in the space and, where there is one, within the budget."""
        known = all(name in self.options.get(path, ()) for path, name in choices.items())
        return known and all(self.meets(choices, level) for level in self._budget())

    def form(self, path: str, name: str) -> str:
        """Equal for candidates of a block of which a search needs but one."""
        return self._forms.get(path, {}).get(name, name)

    def _budget(self) -> list[Level]:
        return [level for level in (self.blocks, self.limit) if level is not None]

    def ordered(self, choices: Choices) -> Choices:
        return {path: choices[path] for path in self.options if path in choices}

    def repair(self, choices: Choices, rng: random.Random, level: Level) -> Choices:
        """Change a subnet at random places until it meets the budget and prunes no more than it must."""
        choices = dict(choices)
        for path, names in self.forced.items():
            if choices.get(path) not in names:
                choices[path] = rng.choice(names)
        kept = [path for path in self.options if path not in choices]
        pruned = [path for path in choices if path not in self.forced]
        rng.shuffle(kept)
        rng.shuffle(pruned)
        if self.blocks is not None:
            while len(choices) > level:
                del choices[pruned.pop()]
            while len(choices) < level:
                path = kept.pop()
                choices[path] = rng.choice(self.options[path])
            return self.ordered(choices)
        while not self.meets(choices, level):
            if not kept:  # everything is pruned, and not cheaply enough
                choices = self.cheapest()
                break
            path = kept.pop()
            choices[path] = rng.choice(self.options[path])
        for path in rng.sample(list(choices), len(choices)):
            without = {p: c for p, c in choices.items() if p != path}
            if self.meets(without, level):
                choices = without
        return self.ordered(choices)

    def mutate(self, choices: Choices, chance: float, rng: random.Random, level: Level) -> Choices:
        changed = dict(choices)
        for path, names in self.options.items():
            if rng.random() < chance:
                new = rng.choice([KEEP, *names])
                changed.pop(path, None)
                if new != KEEP:
                    changed[path] = new
        return self.repair(changed, rng, level)

    def cross(self, a: Choices, b: Choices, rng: random.Random, level: Level) -> Choices:
        child = {}
        for path in self.options:
            name = rng.choice((a, b)).get(path, KEEP)
            if name != KEEP:
                child[path] = name
        return self.repair(child, rng, level)


def _named_blocks(
    options: Mapping[str, list[str]], entries: tuple[str, ...], verb: str
) -> dict[str, list[str]]:
    """{path: candidates} from entries "path" (all its candidates) and "path=candidate", where a path may be a pattern
    as file names have them: of the blocks it means, those that have the candidate."""
    named: dict[str, list[str]] = {}
    for entry in entries:
        pattern, _, name = entry.partition("=")
        paths = [path for path in options if fnmatch.fnmatchcase(path, pattern)]
        if not paths:
            raise BudgetError(f"cannot {verb} block {pattern!r}: this model has {', '.join(options)}")
        named_here = [path for path in paths if not name or name in options[path]]
        if not named_here:
            known = dict.fromkeys(other for path in paths for other in options[path])
            raise BudgetError(f"cannot {verb} {entry!r}: the candidates of {pattern} are {', '.join(known)}")
        for path in named_here:
            named.setdefault(path, []).extend([name] if name else options[path])
    return named
