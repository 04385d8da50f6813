"""Whole-model latency of the four networks: see `depthfuse.benching.bench`, which `depthfuse bench` runs on any model.

    python -m benchmarks.models --models resnet34 mobilenetv2_100 --batch 1 8 --dtype fp32

Each network as it comes from timm and ("+ merged") with every second of its prunable blocks merged, in the form that
usually pays. Weights are random: no speed depends on them. `--busy 2` and `--beside convolutions` time single calls
beside other programs, too, in the columns busy_latency_ms and convolutions_latency_ms. Writes a CSV and a plot to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from torch import nn

from depthfuse import Supernet, merge
from depthfuse.benching.apart import CONVOLUTIONS
from depthfuse.benching.bench import compare, machine, randomised, ratios, write_csv
from depthfuse.benching.engines import ENGINES
from depthfuse.config import DTYPES
from depthfuse.merging.model_inputs import input_size
from depthfuse.spec import ModelSource

MODELS = ("resnet34", "mobilenetv2_100", "mobilenetv2_140", "convnext_tiny", "deit_tiny_patch16_224")
VARIANTS = ("plain", "merged")
# The first of these that a block has: the dense 5x5 of two 3x3 and the dense 7x7 of a ConvNeXt block lose everywhere.
PREFERRED = ("compact", "factorised", "ffn", "dense")


def build(name: str, variant: str) -> nn.Module:
    """The network in evaluation mode with random weights and norms that do something."""
    model = randomised(ModelSource.make(name).build())
    return model if variant == "plain" else merged_half(model)


def merged_half(model: nn.Module) -> nn.Module:
    """The model with every second of its prunable blocks merged."""
    supernet = randomised(Supernet(model))
    options = {path: names for path, names in supernet.options().items() if set(names) & set(PREFERRED)}
    chosen = list(options)[1::2]
    supernet.set_choices({path: next(p for p in PREFERRED if p in options[path]) for path in chosen})
    return merge(supernet).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-ms", type=float, default=150.0, help="time for each contender in each round")
    parser.add_argument(
        "--busy", type=int, default=0, help="busy processes beside which calls are timed, too"
    )
    parser.add_argument(
        "--beside",
        choices=[CONVOLUTIONS],
        help="a program beside which calls are timed, too: PyTorch's convolutions on two threads of OpenMP",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    facts = machine(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value))
    rows = []
    for name, variant in itertools.product(args.models, args.variants):
        model = build(name, variant).to(device, dtype)
        label = name if variant == "plain" else f"{name} + merged"
        for batch in args.batch:
            x = torch.randn(batch, *input_size(model), device=device).to(dtype)
            compared = compare(
                model,
                label,
                x,
                args.contenders,
                args.rounds,
                args.round_ms,
                busy_processes=args.busy,
                beside_convolutions=args.beside == CONVOLUTIONS,
            )
            for row in compared:
                _print(row)
            rows += compared
    place = args.out / f"models_{device.type}_{args.dtype}"
    write_csv(rows, place.with_suffix(".csv"), facts)
    title = f"{facts['device']}, {facts['threads']} threads, {args.dtype}, torch {facts['torch']}"
    ratios(rows, title).save_png(place.with_suffix(".png"))
    print(f"written: {place}.csv and .png")


def _print(row: dict) -> None:
    print(
        f"{row['model']:30} batch {row['batch']:<3} {row['contender']:20} {row['latency_ms']:9.3f} ms "
        f"[{row['latency_q1_ms']:.3f}, {row['latency_q3_ms']:.3f}]   {row['ratio_to_depthfuse']:.2f}x depthfuse's "
        f"time [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]",
        flush=True,
    )


if __name__ == "__main__":
    main()
