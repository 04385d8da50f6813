"""What the pruning side costs: merging a model, and a supernet step against the plain passes it stands for.

    python -m benchmarks.pruning.pipeline [--out benchmarks/results/pipeline_cpu.csv]

Rounds are interleaved; medians with quartiles. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from depthfuse import ModelSource, Supernet, merge
from depthfuse.devices import device_name
from depthfuse.training.objectives import SandwichObjective

MERGED = ("resnet34", "mobilenetv2_140", "convnext_tiny", "deit_tiny_patch16_224")
# (model, image side, batch size): small enough for a CPU, in the shapes of the real thing
STEPS = (
    ("resnet34", 64, 8),
    ("mobilenetv2_100", 96, 8),
    ("convnext_tiny", 64, 4),
    ("deit_tiny_patch16_224", 224, 2),
)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def merge_seconds(name: str, rounds: int) -> list[float]:
    """Merging a random subnet at 224 px, check in float64 included."""
    supernet = Supernet(ModelSource.make(name).build()).eval()
    supernet.set_choices({path: names[0] for path, names in supernet.options().items()})
    return [seconds(lambda: merge(supernet)) for _ in range(rounds)]


def step_ratios(name: str, side: int, batch: int, rounds: int) -> list[float]:
    """One sandwich step (full, fully pruned, one random subnet; forward and backward) over three plain passes of the
    original model, round by round."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 10}
    model = ModelSource.make(name, **kwargs).build().train()
    objective = SandwichObjective(Supernet(model), random_subnets=1).train()
    random.seed(0)
    images, targets = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))

    def sandwich() -> None:
        objective.zero_grad(set_to_none=True)
        objective(images, targets, 0.0).backward()

    def plain() -> None:
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), targets).backward()

    for call in (sandwich, plain):
        call()
    ratios = []
    for _ in range(rounds):
        reference = seconds(plain)
        ratios.append(seconds(sandwich) / reference)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pipeline_cpu.csv"))
    args = parser.parse_args()
    rows = []
    for name in MERGED:
        rows.append((name, "merge", "s", merge_seconds(name, args.rounds)))
    for name, side, batch in STEPS:
        rows.append(
            (
                f"{name} {side} px batch {batch}",
                "sandwich step / 3 plain passes",
                "ratio",
                step_ratios(name, side, batch, args.rounds),
            )
        )
    device = device_name(torch.device("cpu"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["case", "what", "unit", "median", "q1", "q3", "rounds", "device", "threads", "dtype", "torch"]
        )
        for case, what, unit, values in rows:
            q1, median, q3 = statistics.quantiles(values, n=4)
            line = [case, what, unit, f"{median:.3f}", f"{q1:.3f}", f"{q3:.3f}", len(values)]
            writer.writerow([*line, device, torch.get_num_threads(), "float32", torch.__version__])
            print(f"{case:45} {what:32} {median:.3f} {unit} ({q1:.3f} to {q3:.3f})")


if __name__ == "__main__":
    main()
