"""How well a latency table's sums predict whole subnets: measured savings against random subnets timed as wholes.

    python -m benchmarks.pruning.latency_error --models resnet34 --batch 1 --subnets 8

Random weights. One row a model: mean and largest relative error, with the conditions; the tables are kept beside the
CSV, and a run that was stopped goes on with them. Writes benchmarks/results/latency_error_cpu_fp32.csv or the like.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from depthfuse import Supernet
from depthfuse.benching.bench import machine, randomised, write_csv
from depthfuse.config import DTYPES, LatencyConfig
from depthfuse.costs.latency import check_prediction, measure_latencies, relative_errors
from depthfuse.merging.model_inputs import input_size
from depthfuse.spec import ModelSource

MODELS = ("resnet34", "mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224")


def row_of(
    name: str, device: torch.device, config: LatencyConfig, args: argparse.Namespace
) -> dict[str, Any]:
    """The errors of one model's table."""
    model = randomised(ModelSource.make(name).build())
    supernet = randomised(Supernet(model)).to(device)
    size = input_size(model) if args.side is None else (input_size(model)[0], args.side, args.side)
    cache = args.out / "latency_tables" / f"{name}_{device.type}_{config.dtype}_{config.batch_size}.json"
    table = measure_latencies(supernet, size, config, cache)
    checked = check_prediction(supernet, size, config, table, args.subnets, args.seed)
    errors = relative_errors(checked)
    return {
        "model": name,
        "input": "x".join(map(str, size)),
        "batch": config.batch_size,
        "dtype": config.dtype,
        "rounds": config.rounds,
        "subnets": len(checked),
        "whole_ms": round(table.whole, 3),
        "fastest_subnet_ms": round(min(measured_ms for _, _, measured_ms in checked), 3),
        "mean_error_percent": round(100 * statistics.fmean(errors), 2),
        "max_error_percent": round(100 * max(errors), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, help="of the images; default the model's own")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--subnets", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = LatencyConfig(batch_size=args.batch, dtype=args.dtype, rounds=args.rounds)
    path = args.out / f"latency_error_{device.type}_{args.dtype}.csv"
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows.append(row_of(name, device, config, args))
        print(rows[-1], flush=True)
        write_csv(rows, path, machine(device))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
