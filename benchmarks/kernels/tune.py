"""Find the fastest launch configuration of every operator of the networks on the GPU at hand.

    python -m benchmarks.kernels.tune --networks resnet34 --batches 1 128
    python -m benchmarks.kernels.tune --export kernels/configs    # also as a table that the package ships

At most a dozen configurations of each launch, those nearest to the heuristic's, are compiled by --jobs processes, then
measured one after the other. What is found goes into the user's cache as it comes, and is used from then on
(DEPTHFUSE_TUNE=0 ignores it); the table of --export is whole after each operator. A run that was stopped goes on where
it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.micro import DTYPES, select_cases
from benchmarks.kernels.registry import BATCHES, NETWORKS
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.kernels.tuning.lookup import Entry, Request
from depthfuse.kernels.tuning.measure import compile_candidates, tune


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


def call_of(case: Case, dtype: str) -> Callable[[], Tensor]:
    """The operator on random operands, laid out as they are inside a net."""
    return functools.partial(case.ours, **case.operands(DTYPES[dtype], "cuda"))


def compile_in_processes(jobs: int) -> None:
    """Let this command compile, a share of the operators in each of `jobs` processes."""
    command = [sys.executable, "-m", "benchmarks.kernels.tune", *sys.argv[1:], "--compile-share"]
    children = [subprocess.Popen([*command, str(index), str(jobs)]) for index in range(jobs)]
    for child in children:
        child.wait()  # one that fails leaves its compiling to the measuring


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ops", nargs="+", help="only these operators, such as conv2d")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16"])
    parser.add_argument("--again", action="store_true", help="also measure what is known already")
    parser.add_argument("--export", type=Path, help="folder for <architecture>.json with all that is known")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--compile-share", type=int, nargs=2, metavar=("I", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if INTERPRETED or not torch.cuda.is_available():
        parser.error(
            "tuning measures on a GPU, and there is none that this torch can use (or TRITON_INTERPRET is set)"
        )
    entries: dict[Request, Entry] = {}
    cases = select_cases(options.networks, options.batches, options.ops)
    todo = [(dtype, case) for dtype in options.dtypes for case in cases]
    if options.compile_share:
        index, shares = options.compile_share
        for dtype, case in todo[index::shares]:
            with torch.inference_mode():
                compile_candidates(call_of(case, dtype))
        return 0
    compile_in_processes(options.jobs)
    for number, (dtype, case) in enumerate(todo, 1):
        with torch.inference_mode():
            found = tune(call_of(case, dtype), again=options.again)
        for request, entry in found.items():
            gain = entry.heuristic_us / entry.latency_us
            print(
                f"[{number}/{len(todo)}] {request.key()}: {entry.latency_us:.1f} us, {gain:.2f}x",
                flush=True,
            )
        entries |= found
        if options.export:
            export(entries, options.export)
    return 0


if __name__ == "__main__":
    sys.exit(main())
