"""Whole-model latency of the four networks: see `depthfuse.bench`, which `depthfuse bench` runs on any model.

    python -m benchmarks.models --models resnet34 mobilenetv2_100 --batch 1 8 --dtype fp32

Writes a CSV and a plot to benchmarks/results/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from depthfuse.bench import DTYPES, compare, machine, plot, randomised, write_csv
from depthfuse.contenders import CONTENDERS
from depthfuse.spec import ModelSource

MODELS = ("resnet34", "mobilenetv2_100", "mobilenetv2_140", "convnext_tiny", "deit_tiny_patch16_224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-ms", type=float, default=150.0, help="time for each contender in each round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    facts = machine(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value))
    rows = []
    for name in args.models:
        model = randomised(ModelSource.make(name).build()).to(device, dtype)
        for batch in args.batch:
            x = torch.randn(batch, *model.pretrained_cfg["input_size"], device=device).to(dtype)
            compared = compare(model, name, x, args.contenders, args.rounds, args.round_ms)
            for row in compared:
                _print(row)
            rows += compared
    place = args.out / f"models_{device.type}_{args.dtype}"
    write_csv(rows, place.with_suffix(".csv"), facts)
    title = f"{facts['device']}, {facts['threads']} threads, {args.dtype}, torch {facts['torch']}"
    plot(rows, place.with_suffix(".png"), title)
    print(f"written: {place}.csv and .png")


def _print(row: dict) -> None:
    print(
        f"{row['model']:24} batch {row['batch']:<3} {row['contender']:20} {row['latency_ms']:9.3f} ms "
        f"[{row['latency_q1_ms']:.3f}, {row['latency_q3_ms']:.3f}]   {row['ratio_to_depthfuse']:.2f}x depthfuse's "
        f"time [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]",
        flush=True,
    )


if __name__ == "__main__":
    main()
