"""Cost tables and scores made up, for searches that train and time nothing."""

import random

from depthfuse.costs.table import CostTable
from depthfuse.training.evaluation import Score


def make_table(options, seed=0, losing=False):
    """Every candidate saves something, unless `losing`."""
    rng = random.Random(seed)
    low = -0.3 if losing else 0.4
    saved = {p: {n: rng.uniform(low, 1.0) for n in names} for p, names in options.items()}
    return CostTable({"model": "synthetic"}, "ms", 1.2 * len(options), saved)


def additive_judge(options, seed=1):
    rng = random.Random(seed)
    loss = {(p, n): rng.uniform(0, 3) for p, names in options.items() for n in names}

    def judge(choices):
        lost = sum(loss[p, n] for p, n in choices.items())
        return Score(90.0 - lost, lost)

    return judge
