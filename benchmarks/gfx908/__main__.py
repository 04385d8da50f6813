"""Run kernels by their MI100 code, without the card: what is right, and which planted faults are found.

    python -m benchmarks.gfx908 operators --out benchmarks/results/gfx908_operators.csv
    python -m benchmarks.gfx908 networks --networks resnet34 --dtypes fp16 --out benchmarks/results/gfx908_networks.csv
    python -m benchmarks.gfx908 models --out benchmarks/results/gfx908_models.csv
    python -m benchmarks.gfx908 units --networks resnet34 --out benchmarks/results/gfx908_units.csv
    python -m benchmarks.gfx908 times --networks resnet34 --out benchmarks/results/gfx908_times.csv
    python -m benchmarks.gfx908 tiles --networks resnet34 --dtypes fp16 --out benchmarks/results/gfx908_tiles.csv
    python -m benchmarks.gfx908 fit benchmarks/results/gfx908_tiles.csv
    python -m benchmarks.gfx908 ship benchmarks/results/gfx908_times.csv benchmarks/results/gfx908_tiles.csv
    python -m benchmarks.gfx908 compare earlier_times.csv times.csv --out benchmarks/results/gfx908_gains.md
    python -m benchmarks.gfx908 validation --out benchmarks/results/gfx908_validation.csv
    python -m benchmarks.gfx908 planted --out benchmarks/results/gfx908_planted.csv

`operators` runs every operator, whole, at the shapes of `depthfuse self-test` (`--small`: at the smallest of them);
`networks` the launches of real networks at batch 1, a few workgroups of each; `models` whole networks at small images;
`units` counts for which unit of the card the code has most to do; `times` simulates how long it takes, `tiles` at
which tile it takes least, `fit` fits the choice of tiles to that, and `ship` hands both to the package; `compare` puts
two tables of `times` side by side, `validation` such times beside published ones; `planted` breaks compiled kernels on
purpose. Beside each CSV a summary of the same name with `.md`. Rows of another Triton version, network or dtype that
the CSV has stay there. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gfx908 import (
    fitting,
    models,
    networks,
    operators,
    planted,
    shipping,
    tables,
    tiles,
    times,
    units,
    validation,
)
from benchmarks.kernels.cases import DepthwiseCase
from benchmarks.kernels.registry import BATCHES, NETWORKS
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.selftest.cases import CASES, OPS, Case

_WRITE_EVERY_S = 5.0
_CASE = ("triton", "op", "case", "dtype")


def collect(rows: Iterable, out: Path | None, keys: tuple[str, ...], summary) -> list[dict]:
    """Print each row as it comes; write them, with those of `out` that have other `keys`, and a summary.

    Written every few seconds and at the end: what a stopped run has done is there.
    """
    new: list[dict] = []
    before = _read(out) if out and out.exists() else []
    written_s = time.monotonic()

    def write() -> None:
        done = {tuple(row[key] for key in keys) for row in new}
        table = [row for row in before if tuple(row[key] for key in keys) not in done] + new
        _write(out, table)
        _replace(out.with_suffix(".md"), summary(table))

    try:
        for row in rows:
            new.append({name: str(value) for name, value in dataclasses.asdict(row).items()})
            print(" ".join(value for value in new[-1].values() if value), flush=True)
            if out and time.monotonic() - written_s > _WRITE_EVERY_S:
                write()
                written_s = time.monotonic()
    finally:
        if out and new:
            write()
    print(summary(new))
    return new


def _read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(out: Path, table: list[dict]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    os.replace(part, out)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("operators", "networks", "models", "units", "times", "tiles", "validation", "planted"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, help="CSV to write")
        if name == "validation":
            continue
        command.add_argument("--dtypes", nargs="+", choices=operators.DTYPES, default=list(operators.DTYPES))
        if name == "models":
            command.add_argument(
                "--networks", nargs="+", choices=models.IMAGE_SIZES, default=list(models.IMAGE_SIZES)
            )
            command.add_argument("--blocks", nargs="+", choices=models.BLOCKS, default=list(models.BLOCKS))
            continue
        command.add_argument("--ops", nargs="+", choices=(*OPS, DepthwiseCase.op), help="only these")
        if name in ("networks", "units", "times", "tiles"):
            command.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
            command.add_argument(
                "--batches",
                nargs="+",
                type=int,
                default=list(BATCHES),
                help="of `units`, `times` and `tiles`",
            )
            continue
        command.add_argument("--cases", nargs="+", help="only those of these names, such as 3x3")
        command.add_argument("--small", action="store_true", help="at the smallest shapes")
        if name == "planted":
            command.add_argument("--swaps", type=int, default=20, help="pairs of registers swapped, a kernel")
    command = commands.add_parser("compare")
    command.add_argument("tables", nargs=2, type=Path, help="CSVs of `times`: before, after")
    command.add_argument("--out", type=Path, required=True, help="Markdown to write")
    command = commands.add_parser("fit")
    command.add_argument("table", type=Path, help="CSV of `tiles`")
    command.add_argument("--steps", type=int, default=3000, help="random steps, of some 10 ms")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("ship")
    command.add_argument("times", type=Path, help="CSV of `times`, for predictions")
    command.add_argument("tiles", type=Path, help="CSV of `tiles`, for the configurations of its launches")
    options = parser.parse_args()
    if options.command == "ship":
        print(shipping.ship(_read(options.times), _read(options.tiles)))
        return 0
    if options.command == "fit":
        print(fitting.report(options.table, options.steps, options.seed))
        return 0
    if options.command == "compare":
        _replace(options.out, tables.compared(*map(_read, options.tables)))
        return 0
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    if options.command == "planted":
        rows = planted.rows(_cases(parser, options), options.dtypes, options.small, options.swaps)
        return 1 if any(map(planted.is_lost, collect(rows, options.out, _CASE, tables.planted))) else 0
    if options.command == "validation":
        collect(validation.rows(), options.out, ("what",), tables.validation)
        return 0
    if options.command in ("units", "times", "tiles"):
        kind, summary = {
            "units": (units, tables.units),
            "times": (times, tables.times),
            "tiles": (tiles, tables.tiles),
        }[options.command]
        rows = kind.rows(options.networks, options.batches, options.ops, options.dtypes)
        collect(rows, options.out, ("triton", "network", "batch", "op", "dtype"), summary)
        return 0
    if options.command == "operators":
        rows = operators.rows(_cases(parser, options), options.dtypes, options.small)
        found = collect(rows, options.out, _CASE, tables.operators)
    elif options.command == "networks":
        rows = networks.rows(options.networks, options.ops, options.dtypes)
        found = collect(rows, options.out, ("triton", "network", "op", "dtype"), tables.networks)
    else:
        rows = models.rows(options.networks, options.dtypes, options.blocks)
        found = collect(rows, options.out, ("triton", "network", "dtype", "blocks"), tables.models)
    return 1 if any(row["outcome"] != operators.RIGHT for row in found) else 0


def _cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    cases = operators.cases_of(options.ops, options.cases)
    if not cases:
        parser.error(f"no such case; there are: {', '.join(case.name for case in CASES)}")
    return cases


if __name__ == "__main__":
    sys.exit(main())
