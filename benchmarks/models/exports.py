"""What networks compute, and how fast, as the files that `depthfuse.export` writes, in each runtime that is here.

    python -m benchmarks.models.exports --models resnet34 --runtimes onnx openvino

The networks of `benchmarks.models`, torchvision's ResNet-50 and Hugging Face's ViT (three blocks of a base one), plain
and with half of their blocks merged; the batch is open, the files are checked as always. Each file runs in a process of
its own, and they are timed in turn, beside eager, of which the error is told, and the accelerated model with our own
engine. Rows go to benchmarks/results/exports_cpu.csv, in the place of earlier ones of the same network.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.__main__ import VARIANTS, merged_half
from benchmarks.models.__main__ import build as build_timm
from depthfuse.acceleration import accelerate
from depthfuse.benching.apart import time_apart
from depthfuse.benching.bench import machine, randomised, write_csv
from depthfuse.benching.engines import OURS
from depthfuse.exporting import RUNTIMES, export
from depthfuse.measuring.timing import quartiles
from depthfuse.merging.model_inputs import input_size

HUGGING_FACE = "hf:vit"
MODELS = (
    "resnet34",
    "mobilenetv2_100",
    "convnext_tiny",
    "deit_tiny_patch16_224",
    "torchvision:resnet50",
    HUGGING_FACE,
)
EAGER = "eager"
FIGURES = ("error_to_eager", "latency_ms", "q1_ms", "q3_ms", "speedup_over_eager")
RUN_HERE = ("onnx", "openvino", "torch", "aoti", "executorch")


def build(name: str, variant: str) -> nn.Module:
    """The network in evaluation mode, with random weights, always the same, and norms that do something."""
    torch.manual_seed(0)
    if name != HUGGING_FACE:
        return build_timm(name, variant)
    import transformers

    from depthfuse.logits import Logits

    config = transformers.ViTConfig(num_hidden_layers=3)
    model = randomised(Logits(transformers.ViTForImageClassification(config)))
    return model if variant == "plain" else merged_half(model)


def eager(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return model


def ours(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return accelerate(model, x, engines="own")


def write(name: str, variant: str, runtime: str, path: Path) -> str:
    """Export a network; what was written, or why not."""
    torch.set_num_threads(1)
    model = build(name, variant)
    try:
        with torch.no_grad():
            return str(export(model, torch.randn(1, *input_size(model)), path, runtime))
    except Exception as problem:  # the table is there to show whatever goes wrong
        return f"{type(problem).__name__}: {problem}"


def loaded(model: nn.Module, x: Tensor, path: Path, runtime: str) -> Callable[[Tensor], Tensor]:
    run = RUNTIMES[runtime].run(path)
    return lambda x: run(x)[0]


def judge(failed: dict[str, str], name: str, outcome: float | str) -> bool:
    if isinstance(outcome, str):
        failed[name] = outcome
    return not isinstance(outcome, str)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runtimes", nargs="+", choices=RUN_HERE, default=list(RUN_HERE))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-ms", type=float, default=150.0, help="time for each file in each round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = [name for name in args.runtimes if not RUNTIMES[name].missing(running=True)]
    path = args.out / "exports_cpu.csv"
    context = torch.multiprocessing.get_context("spawn")
    for name, variant in itertools.product(args.models, args.variants):
        model = build(name, variant)
        x = torch.randn(1, *input_size(model))
        failed: dict[str, str] = {}
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            files = {runtime: Path(folder) / f"{runtime}{RUNTIMES[runtime].suffix}" for runtime in here}
            with ProcessPoolExecutor(args.threads, context) as pool:
                jobs = {each: pool.submit(write, name, variant, each, files[each]) for each in here}
            for runtime, job in jobs.items():
                print(job.result(), flush=True)
                if not files[runtime].exists():
                    failed[runtime] = job.result()
            makes = {EAGER: eager, OURS: ours}
            for runtime in here:
                if runtime not in failed:
                    makes[runtime] = functools.partial(loaded, path=files[runtime], runtime=runtime)
            errors, timings, _ = time_apart(
                makes, model, x, args.rounds, args.round_ms, {}, functools.partial(judge, failed)
            )
        rows = []
        for runtime in (EAGER, OURS, *here):
            row = {"model": name, "variant": variant, "runtime": runtime} | dict.fromkeys(FIGURES, "")
            row["failed"] = failed.get(runtime, "")
            if runtime in timings:
                low, middle, high = quartiles(timings[runtime].rounds_ms)
                row |= {"latency_ms": f"{middle:.3f}", "q1_ms": f"{low:.3f}", "q3_ms": f"{high:.3f}"}
                row["speedup_over_eager"] = f"{timings[runtime].speedup_over(timings[EAGER]):.2f}"
                row["error_to_eager"] = f"{errors[runtime]:.1e}"
            print(row, flush=True)
            rows.append(row)
        facts = machine(torch.device("cpu"))
        write_csv(others(path, name, variant) + [row | facts for row in rows], path, {})


def others(path: Path, model: str, variant: str) -> list[dict[str, Any]]:
    """Rows of other networks."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if (row["model"], row["variant"]) != (model, variant)]


if __name__ == "__main__":
    main()
