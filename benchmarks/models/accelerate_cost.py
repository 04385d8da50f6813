"""What `accelerate` itself costs: seconds, and memory beside the model's own.

    python -m benchmarks.models.accelerate_cost --models resnet34 --tune heuristic

Each figure is the median of several fresh processes, in which the model ran once before. Memory is the largest growth
of the resident set during `accelerate(model, x)`, over the bytes of the model's weights; the plan that stays is one
more copy of these. Writes benchmarks/results/accelerate_cost_cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import depthfuse
from depthfuse.benching.bench import machine, randomised
from depthfuse.merging.model_inputs import input_size
from depthfuse.spec import ModelSource


def measure(name: str, tune: str) -> dict[str, float]:
    """Of this process, which must have done nothing before."""
    model = randomised(ModelSource.make(name).build())
    x = torch.randn(1, *input_size(model))
    with torch.no_grad():
        model(x)
    model_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    start = time.perf_counter()
    depthfuse.accelerate(model, x, tune=tune)
    seconds = time.perf_counter() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    grown = peak_bytes - pages * os.sysconf("SC_PAGE_SIZE")
    return {"seconds": seconds, "model_mb": model_bytes / 1e6, "peak_growth_over_model": grown / model_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["resnet34", "mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224"],
    )
    parser.add_argument("--tune", nargs="+", choices=("off", "heuristic", "measure"), default=["heuristic"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results" / "accelerate_cost_cpu.csv"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.models[0], options.tune[0])))
        return
    rows = []
    for name in options.models:
        for tune in options.tune:
            command = [
                sys.executable,
                "-m",
                "benchmarks.models.accelerate_cost",
                "--one",
                "--models",
                name,
                "--tune",
                tune,
            ]
            runs = [
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[
                        -1
                    ]
                )
                for _ in range(options.runs)
            ]
            medians = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
            rows.append({"model": name, "tune": tune, **medians, "runs": options.runs})
            print(rows[-1], flush=True)
    facts = machine(torch.device("cpu"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *facts])
        writer.writeheader()
        writer.writerows(row | facts for row in rows)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
