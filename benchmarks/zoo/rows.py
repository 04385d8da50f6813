"""The rows of a table of the zoo on the disk: a run that was stopped goes on from them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.zoo.nets import ZOO

RESULTS = Path(__file__).parents[1] / "results"


def read(path: Path) -> dict[str, dict[str, str]]:
    """{library/net: row} of what is there already."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {f"{row['library']}/{row['net']}": row for row in csv.DictReader(file)}


def write(path: Path, columns: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> None:
    """All rows, in the order of the zoo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows[net.key] for net in ZOO if net.key in rows)
    temporary.replace(path)
