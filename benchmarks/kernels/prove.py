"""Compile every operator for cards that are not there, and prove what its code uses.

    python -m benchmarks.kernels.prove --targets gfx908 sm_90 --out benchmarks/results/prove_triton3.9.csv

Each row is one operator of one network at one shape: the tile that the heuristic picks for that target, the registers,
spills, memory, occupancy and matrix instructions of the code that a launch would run, what its loops do, and the time
below which the device cannot go. Exit status 1 where a goal is missed (`goals.faults`); what will probably cost time
(`goals.worries`) is summed up at the end, and beside the CSV in a file of the same name with `.md`.

Shapes that run the same code are compiled once. Results are cached in the user's cache directory, so that a run which
was stopped goes on where it was. Several runs may compile side by side, each some `--targets`, and a last one over all
of them takes everything from the cache; or each adds to one table with `--append`.
"""

import argparse
import csv
import dataclasses
import hashlib
import itertools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from benchmarks.kernels import amd_code, control_flow, goals, nvidia_code, occupancy, opcodes, resources
from benchmarks.kernels.cases import Case
from benchmarks.kernels.prove_report import summary
from benchmarks.kernels.registry import BATCHES, NETWORKS, unique_cases
from benchmarks.kernels.resources import Resources, key_of, resources_of
from depthfuse import devices
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
        found = {"faults": " ".join(self.faults()), "worries": " ".join(self.worries())}
        return row | dataclasses.asdict(self.resources) | found

    def faults(self) -> list[str]:
        """The goals that this code misses; see `goals.faults`."""
        return goals.faults(self.resources, self.kernel, self.dtype, TARGETS[self.target])

    def worries(self) -> list[str]:
        """What will probably cost time; see `goals.worries`."""
        return goals.worries(self.resources, self.kernel, self.programs, TARGETS[self.target])


def readings_cache() -> MeasuredCache:
    """What was read off compiled code before, by the readers as they are now and for the limits of the devices."""
    digest = hashlib.sha256()
    for reader in (amd_code, control_flow, devices, nvidia_code, occupancy, opcodes, resources):
        digest.update(Path(reader.__file__).read_bytes())
    return MeasuredCache({"triton": triton.__version__, "read by": digest.hexdigest()[:16]})


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
                    for dtype in filter(lambda name: case.supports(DTYPES[name]), dtypes):
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
            tile=tile_of(launch),
            programs=programs,
            resources=cached_resources(launch, target, cache),
            roofline_us=round(time_us, 2),
        )


def tile_of(launch: Launch) -> str:
    """ "BLOCK_M=128 ... num_warps=8 ...": what the heuristic chose."""
    blocks = {k: v for k, v in launch.arguments.items() if k.startswith(("BLOCK", "PATCH", "SPLITS"))}
    options = {k: v for k, v in launch.options.items() if k != "enable_fp_fusion"}
    return " ".join(f"{k}={v}" for k, v in (blocks | options).items())


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """The rows of `new`, after those of `old` whose target, dtype, network, batch and operator have none in `new`.

    Raises:
        ValueError: `old` has other columns: it was made by another version of this module.
    """
    if old and new and set(old[0]) != set(new[0]):
        differing = ", ".join(sorted(set(old[0]) ^ set(new[0])))
        raise ValueError(f"the table has other columns ({differing}); write it anew, without --append")

    def key(row: dict) -> tuple:
        return tuple(str(row[name]) for name in ("triton", "target", "dtype", "network", "batch", "op"))

    made = {key(row) for row in new}
    return [row for row in old if key(row) not in made] + new


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--ops", nargs="+", help="only these operators, such as conv2d")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="one shape of each operator")
    parser.add_argument("--out", type=Path, help="CSV to write; the table's summary is printed in any case")
    parser.add_argument(
        "--append", action="store_true", help="keep the rows of --out that this run does not make"
    )
    options = parser.parse_args()
    arguments = vars(options).copy()
    out, append = arguments.pop("out"), arguments.pop("append")
    if append and not out:
        parser.error("--append needs --out: the table to add to")

    rows = []
    for row in prove(**arguments, cache=readings_cache()):
        rows.append(row)
        if row.faults():
            found = ", ".join(row.faults())
            print(f"{row.target} {row.dtype} {row.kernel} {row.shape} [{row.tile}]: {found}", flush=True)
    flat = [row.flat() for row in rows]
    if append and out.exists():
        flat = merged(read_rows(out), flat)
    print(summary(flat))
    if out and flat:
        write_rows(out, flat)
        out.with_suffix(".md").write_text(summary(flat))
    faulty = sum(bool(row.faults()) for row in rows)
    targets = ", ".join(options.targets)
    print(f"{len(rows)} launches on {targets} with Triton {triton.__version__}: {faulty} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
