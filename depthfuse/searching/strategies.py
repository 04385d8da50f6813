"""Search strategies: which subnets of a space are worth scoring.

Each is a function of (space, judge, config, rng). `judge(choices)` scores a subnet (higher is better) and remembers it,
so a strategy returns nothing: the search takes the best of all that was judged. All draws come from `rng`, so that a
killed search, whose scores are kept, repeats itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from depthfuse.config import SearchConfig
from depthfuse.errors import BudgetError
from depthfuse.searching.space import Choices, Level, SearchSpace
from depthfuse.spec import key_of

Judge = Callable[[Choices], float]
Walk = Callable[[SearchSpace, Judge, SearchConfig, random.Random], None]
Importance = dict[str, dict[str, float]]  # {block: {candidate: score lost when this block alone is merged}}


@dataclass(frozen=True)
class Strategy:
    """A way to search. count: about how many subnets it judges."""

    name: str
    run: Walk
    count: Callable[[SearchSpace, SearchConfig], int]


STRATEGIES: dict[str, Strategy] = {}


def strategy(name: str, count: Callable[[SearchSpace, SearchConfig], int]) -> Callable[[Walk], Walk]:
    """Function decorator: register a strategy."""

    def add(run: Walk) -> Walk:
        STRATEGIES[name] = Strategy(name, run, count)
        return run

    return add


def find_strategy(name: str) -> Strategy:
    """Raises BudgetError for an unknown name; the message lists the known."""
    if name not in STRATEGIES:
        raise BudgetError(f"unknown search strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


@strategy("evolution", lambda space, config: config.population * (config.generations + 1))
def evolution(space: SearchSpace, judge: Judge, config: SearchConfig, rng: random.Random) -> None:
    """The paper's genetic search, as in SPOS (Guo et al., ECCV 2020): each generation keeps the best as parents and
    fills up with crossovers and mutations that meet the budget.

    Without a budget every subnet is bred for a level of its own, and parents are those that nothing beats in both
    score and cost (the non-dominated sorting of NSGA-II, Deb et al., 2002).
    """
    levels = space.levels(config.front)
    population = _distinct(lambda: space.repair({}, rng, rng.choice(levels)), config.population)
    for _ in range(config.generations):
        parents = _rank(space, judge, population)[: config.parents]

        def child(parents: list[Choices] = parents) -> Choices:
            level = rng.choice(levels)
            if rng.random() < 0.5:
                return space.cross(rng.choice(parents), rng.choice(parents), rng, level)
            return space.mutate(rng.choice(parents), config.mutation, rng, level)

        population = _distinct(child, config.population, parents)
    for choices in population:
        judge(choices)


def _rank(space: SearchSpace, judge: Judge, population: list[Choices]) -> list[Choices]:
    """The best first: by score, or, without a budget, front by front."""
    scored = sorted(
        (-judge(choices), space.cost(choices), key_of(choices), choices) for choices in population
    )
    if space.unit is not None:
        return [row[3] for row in scored]
    ranked: list[Choices] = []
    while scored:
        front = pareto([(cost, -score, row) for row in scored for score, cost in [row[:2]]])
        ranked += [row[3] for row in front]
        scored = [row for row in scored if row not in front]
    return ranked


def pareto(points: list[tuple[float, float, object]]) -> list:
    """The third entries of those (cost, score, _) for which no other is both as cheap and better; cheapest first."""
    best, front = float("-inf"), []
    for _cost, score, item in sorted(points, key=lambda p: (p[0], -p[1])):
        if score > best:
            best = score
            front.append(item)
    return front


def _distinct(draw: Callable[[], Choices], count: int, start: list[Choices] | None = None) -> list[Choices]:
    """Up to `count` different subnets; fewer where the space holds no more."""
    found = {key_of(choices): choices for choices in start or []}
    for _ in range(20 * count):
        if len(found) >= count:
            break
        choices = draw()
        found.setdefault(key_of(choices), choices)
    return list(found.values())


def importances(space: SearchSpace, judge: Judge) -> Importance:
    """Score lost by merging each block alone, in each way: one judged subnet a candidate, linear in the blocks."""
    whole = judge({})
    return {
        path: {name: whole - judge({path: name}) for name in names} for path, names in space.options.items()
    }


def _singles(space: SearchSpace) -> int:
    return 1 + sum(map(len, space.options.values()))


@strategy("milp", lambda space, config: _singles(space) + len(space.levels(config.front)) * config.best)
def integer_programme(space: SearchSpace, judge: Judge, config: SearchConfig, rng: random.Random) -> None:
    """The subnets of least total importance within the budget, exactly; the few best are then judged whole.

    Assumes that losses add up, as HALP (Shen et al., NeurIPS 2022) and LayerMerge (Kim et al., ICML 2024) do.
    """
    lost = importances(space, judge)
    for level in space.levels(config.front):
        for choices in best_additive(space, lost, level, config.best):
            judge(choices)


def best_additive(space: SearchSpace, lost: Importance, level: Level, count: int = 1) -> list[Choices]:
    """The `count` feasible subnets of least summed loss, best first; exact (scipy's `milp`, the HiGHS solver).

    One binary variable for each block and candidate, at most one a block. After each answer a cut excludes it, and what
    is of the same form. Fewer come back where the space holds no more. Raises BudgetError where scipy is missing.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise BudgetError(
            'the strategy "milp" needs scipy: pip install "depthfuse[search]", or --search.strategy evolution'
        ) from error
    pairs = [(path, name) for path, names in space.options.items() for name in names]
    paths = list(space.options)
    rows = np.array([paths.index(path) for path, _ in pairs])
    columns = np.arange(len(pairs))
    one_each = csr_array((np.ones(len(pairs)), (rows, columns)), shape=(len(paths), len(pairs)))
    at_least = np.array([1.0 if path in space.forced else 0.0 for path in paths])
    constraints = [LinearConstraint(one_each, at_least, 1.0)]
    if space.blocks is not None:
        constraints.append(LinearConstraint(np.ones((1, len(pairs))), level, level))
    else:
        assert space.costs is not None
        whole = space.costs.whole  # shares of the whole: the solver's tolerances are absolute
        saved = np.array([[space.costs.saved[path][name] / whole for path, name in pairs]])
        constraints.append(LinearConstraint(saved, 1.0 - level / whole, np.inf))
    loss = np.array([lost[path][name] for path, name in pairs])
    scale = max(float(np.abs(loss).max()), 1e-30)
    found: list[Choices] = []
    for _ in range(count):
        answer = milp(
            loss / scale,
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if answer.x is None:
            break
        taken = answer.x > 0.5
        found.append({path: name for (path, name), on in zip(pairs, taken, strict=True) if on})
        # differ from this answer somewhere: sum over its forms (1 - x) + sum over the others x >= 1
        forms = {(path, space.form(path, name)) for path, name in found[-1].items()}
        alike = np.array([(path, space.form(path, name)) in forms for path, name in pairs])
        constraints.append(LinearConstraint(np.where(alike, -1.0, 1.0)[None], 1.0 - taken.sum(), np.inf))
    return found


@strategy("greedy", lambda space, config: _singles(space) + len(space.options))
def greedy(space: SearchSpace, judge: Judge, config: SearchConfig, rng: random.Random) -> None:
    """Merge the block that loses least for what it saves, again and again, by importances of single blocks."""
    lost = importances(space, judge)
    choices: Choices = {path: min(names, key=lambda n: lost[path][n]) for path, names in space.forced.items()}
    for level in sorted(space.levels(config.front), reverse=space.blocks is None):
        while not space.meets(choices, level):
            moves = _moves(space, lost, choices)
            if not moves:
                return
            _, path, name = min(moves)
            choices[path] = name
        judge(space.ordered(choices))


def _moves(space: SearchSpace, lost: Importance, choices: Choices) -> list[tuple[float, str, str]]:
    """(loss for each unit saved, block, candidate) of each step that saves something more."""
    moves = []
    for path, names in space.options.items():
        now = choices.get(path)
        for name in names:
            if space.blocks is not None:
                if now is None:
                    moves.append((lost[path][name], path, name))
                continue
            assert space.costs is not None
            saved = space.costs.saved[path]
            more = saved[name] - (saved[now] if now else 0.0)
            if more > 0:
                moves.append(((lost[path][name] - (lost[path][now] if now else 0.0)) / more, path, name))
    return moves


@strategy("random", lambda space, config: config.population * (config.generations + 1))
def random_search(space: SearchSpace, judge: Judge, config: SearchConfig, rng: random.Random) -> None:
    """A control: as many random subnets as the evolution judges."""
    levels = space.levels(config.front)
    draws = config.population * (config.generations + 1)
    for choices in _distinct(lambda: space.repair({}, rng, rng.choice(levels)), draws):
        judge(choices)


@strategy("uniform", lambda space, config: len(space.levels(config.front)))
def uniform(space: SearchSpace, judge: Judge, config: SearchConfig, rng: random.Random) -> None:
    """A control: as few blocks as the budget asks for, evenly spaced, each merged in the way that saves most."""
    best = {path: names[0] for path, names in space.options.items()}
    if space.costs is not None:
        saved = space.costs.saved
        best = {path: max(names, key=lambda n: saved[path][n]) for path, names in space.options.items()}
    free = [path for path in best if path not in space.forced]
    for level in space.levels(config.front):
        for count in range(len(free) + 1):
            spaced = {free[(2 * i + 1) * len(free) // (2 * count)] for i in range(count)}
            choices = {path: name for path, name in best.items() if path in spaced or path in space.forced}
            if space.meets(choices, level):
                judge(choices)
                break


@strategy("pick", lambda space, config: 0)
def pick(space: SearchSpace, judge: Judge, config: SearchConfig, rng: random.Random) -> None:
    """Score nothing: take the best subnet of an earlier search (`start_from`) that meets the budget."""
