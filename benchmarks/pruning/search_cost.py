"""How the cost of a search grows with the blocks: seconds of the search itself, and subnets that it scores.

python -m benchmarks.pruning.search_cost      # writes benchmarks/results/search_cost.csv

Synthetic nets of 16, 32 and 64 blocks with 4 candidates each, random savings and random additive losses; scoring takes
no time, so that the seconds are the strategy's own. With a real net each scored subnet adds a re-calibration and a pass
over the held-out images.
"""

from __future__ import annotations

import csv
import random
import time
from pathlib import Path

from depthfuse.config import SearchConfig
from depthfuse.costs.table import CostTable
from depthfuse.searching.space import SearchSpace
from depthfuse.searching.strategies import STRATEGIES
from depthfuse.spec import key_of


def main() -> None:
    rows = []
    for strategy in ("evolution", "milp", "greedy"):
        for blocks in (16, 32, 64):
            rng = random.Random(0)
            options = {f"block{i}": [f"candidate{j}" for j in range(4)] for i in range(blocks)}
            saved = {p: {n: rng.uniform(0.05, 0.8) for n in names} for p, names in options.items()}
            loss = {(p, n): rng.uniform(0, 3) for p, names in options.items() for n in names}
            table = CostTable({}, "ms", 1.2 * blocks, saved)
            config = SearchConfig(strategy=strategy, speedup=1.3)
            space, scored = SearchSpace(options, config, table), {}

            def judge(choices, scored=scored, loss=loss):
                scored[key_of(choices)] = -sum(loss[p, n] for p, n in choices.items())
                return scored[key_of(choices)]

            start = time.perf_counter()
            STRATEGIES[strategy].run(space, judge, config, random.Random(0))
            seconds = time.perf_counter() - start
            rows.append(
                {"strategy": strategy, "blocks": blocks, "seconds": f"{seconds:.3f}", "scored": len(scored)}
            )
            print(rows[-1])
    with (Path(__file__).parents[1] / "results" / "search_cost.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
