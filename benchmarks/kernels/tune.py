"""Find the fastest launch configuration of every operator of the networks on the GPU at hand.

    python -m benchmarks.kernels.tune --networks resnet34 --batches 1 128
    python -m benchmarks.kernels.tune --export kernels/configs    # also as a table that the package ships

What is found goes into the user's cache as it comes, and is used from then on (DEPTHFUSE_TUNE=0 ignores it). A run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from benchmarks.kernels.micro import DTYPES, select_cases
from benchmarks.kernels.registry import BATCHES, NETWORKS
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.kernels.tuning.lookup import Entry, Request
from depthfuse.kernels.tuning.measure import tune


def export(entries: dict[Request, Entry], folder: Path) -> Path:
    """Write the entries, all of one device, as `folder`/<architecture>.json; returns its path."""
    request = next(iter(entries))
    table = {
        "device": torch.cuda.get_device_name(request.device) if request.device.type == "cuda" else "",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "configs": {request.key(): asdict(entry) for request, entry in entries.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{request.target.arch}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ops", nargs="+", help="only these operators, such as conv2d")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16"])
    parser.add_argument("--again", action="store_true", help="also measure what is known already")
    parser.add_argument("--export", type=Path, help="folder for <architecture>.json with all that is known")
    options = parser.parse_args()
    if INTERPRETED or not torch.cuda.is_available():
        parser.error(
            "tuning measures on a GPU, and there is none that this torch can use (or TRITON_INTERPRET is set)"
        )
    entries: dict[Request, Entry] = {}
    cases = select_cases(options.networks, options.batches, options.ops)
    for dtype in options.dtypes:
        for number, case in enumerate(cases, 1):
            call = functools.partial(case.ours, **case.operands(DTYPES[dtype], "cuda"))
            with torch.inference_mode():
                found = tune(call, again=options.again)
            for request, entry in found.items():
                gain = entry.heuristic_us / entry.latency_us
                print(
                    f"[{number}/{len(cases)}] {request.key()}: {entry.latency_us:.1f} us, {gain:.2f}x",
                    flush=True,
                )
            entries |= found
    if options.export:
        print(f"written: {export(entries, options.export)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
