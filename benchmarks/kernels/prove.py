"""Compile every operator for cards that are not there, and prove what its code uses.

    python -m benchmarks.kernels.prove --targets gfx908 sm_90 --out benchmarks/results/prove_triton3.9.csv

Each row is one operator of one network at one shape: the tile that the heuristic picks for that target, the registers,
spills, memory, occupancy and matrix instructions of the code that a launch would run, and the time below which the
device cannot go. Shapes that run the same code are compiled once. Results are cached in the user's cache directory,
so that a run which was stopped goes on where it was. Exit status 1 where a goal is missed (see `faults`).
"""

import argparse
import csv
import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from benchmarks.kernels.cases import Case
from benchmarks.kernels.registry import BATCHES, NETWORKS, unique_cases
from benchmarks.kernels.resources import Resources, key_of, resources_of
from depthfuse.kernels.launch import INTERPRETED, TARGETS, Launch, Target
from depthfuse.measured_cache import MeasuredCache
from depthfuse.measuring.roofline import roofline_us

log = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One launch of one operator on one target."""

    triton: str
    target: str
    dtype: str
    network: str
    batch: int
    op: str
    kernel: str
    shape: str
    layers: int  # how many layers of the network, merged and not, are this operator
    first_layer: str
    tile: str
    programs: int
    resources: Resources
    roofline_us: float

    def flat(self) -> dict:
        """Column -> value."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "resources"}
        return row | dataclasses.asdict(self.resources) | {"faults": " ".join(self.faults())}

    def faults(self) -> list[str]:
        """The goals that this code misses; see `faults`."""
        return faults(self.resources, self.kernel, self.dtype, TARGETS[self.target])


def faults(resources: Resources, kernel: str, dtype: str, target: Target) -> list[str]:
    """Goals that compiled code misses.

    No spills and no private memory; shared memory within the target's limit; matrix instructions where the operator is
    a matrix product (float32 on NVIDIA has none: its true products are plain multiply-adds); no 16-bit LDS
    read in a loop; and, for those products, two waves a SIMD so that one computes while the other loads.
    """
    found = []
    if resources.spills:
        found.append("spills")
    if resources.private_bytes:
        found.append("private_memory")
    if resources.shared_bytes > target.shared_bytes:
        found.append("shared_memory")
    if resources.narrow_reads_in_loop:
        found.append("narrow_reads")
    if kernel in VECTOR_KERNELS:
        return found
    if not resources.matrix and not (target.backend == "cuda" and dtype == "fp32"):
        found.append("no_matrix_instructions")
    if resources.occupancy < 2:
        found.append("occupancy")
    return found


# Those with no matrix product in them.
VECTOR_KERNELS = ("depthwise_kernel", "pool_kernel", "pool_linear_kernel")


def cached_resources(launch: Launch, target: Target, cache: MeasuredCache) -> Resources:
    """`resources_of`, kept in `cache` under a key that covers source, specialisation, target and Triton's version."""
    question = {"compiled": key_of(launch, target)}
    answer = cache.get(question)
    if answer is None:
        answer = dataclasses.asdict(resources_of(launch, target))
        cache.put(question, answer)
    return Resources(**answer)


def prove(
    targets: list[str],
    networks: list[str],
    batches: list[int],
    ops: list[str] | None,
    dtypes: list[str],
    quick: bool,
    cache: MeasuredCache,
) -> Iterator[Row]:
    """A row for each launch of each distinct operator of the networks, or `quick`, of one shape of each operator.

    Raises:
        RuntimeError: the kernels were imported with TRITON_INTERPRET=1, so there is nothing to compile.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    for name in targets:
        done = set()
        for network, batch in itertools.product(networks, batches):
            for case, layer_names in unique_cases(network, batch).items():
                if (ops is None or case.op in ops) and not (quick and case.op in done):
                    done.add(case.op)
                    for dtype in dtypes:
                        yield from _rows(case, layer_names, network, batch, dtype, TARGETS[name], cache)


def _rows(
    case: Case,
    layer_names: list[str],
    network: str,
    batch: int,
    dtype: str,
    target: Target,
    cache: MeasuredCache,
) -> Iterator[Row]:
    cost = case.elements_moved() * DTYPES[dtype].itemsize
    time_us = roofline_us(target.arch, case.flops(), cost, DTYPES[dtype], case.matrix)
    for launch in case.launches(DTYPES[dtype], target):
        programs = 1
        for extent in launch.grid:
            programs *= extent
        yield Row(
            triton=triton.__version__,
            target=target.arch,
            dtype=dtype,
            network=network,
            batch=batch,
            op=case.op,
            kernel=launch.kernel.fn.__name__,
            shape=case.shape(),
            layers=len(layer_names),
            first_layer=layer_names[0],
            tile=_tile(launch),
            programs=programs,
            resources=cached_resources(launch, target, cache),
            roofline_us=round(time_us, 2),
        )


def _tile(launch: Launch) -> str:
    """ "BLOCK_M=128 ... num_warps=8 ...": what the heuristic chose."""
    blocks = {k: v for k, v in launch.arguments.items() if k.startswith(("BLOCK", "PATCH", "SPLITS"))}
    options = {k: v for k, v in launch.options.items() if k != "enable_fp_fusion"}
    return " ".join(f"{k}={v}" for k, v in (blocks | options).items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--ops", nargs="+", help="only these operators, such as conv2d")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16"])
    parser.add_argument("--quick", action="store_true", help="one shape of each operator")
    parser.add_argument("--out", type=Path, help="CSV to write; the table's summary is printed in any case")
    options = parser.parse_args()
    arguments = vars(options).copy()
    out = arguments.pop("out")

    rows = []
    for row in prove(
        **arguments, cache=MeasuredCache({"triton": triton.__version__, "compiled by": "prove"})
    ):
        rows.append(row)
        if row.faults():
            found = ", ".join(row.faults())
            print(f"{row.target} {row.dtype} {row.kernel} {row.shape} [{row.tile}]: {found}", flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0].flat()))
            writer.writeheader()
            writer.writerows(row.flat() for row in rows)
    faulty = sum(bool(row.faults()) for row in rows)
    targets = ", ".join(options.targets)
    print(f"{len(rows)} launches on {targets} with Triton {triton.__version__}: {faulty} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
