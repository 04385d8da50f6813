"""The prover's rows in short: how many of a kernel's rows have which worry, and where a remedy is worth most.

Rows are those of the CSV: column -> value or its text.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from benchmarks.kernels.goals import WORRIES

_HEAVIEST = 10


def summary(rows: list[dict]) -> str:
    """Two tables in Markdown, aligned so that they can be read as they are."""
    parts = ["# What the compiled code says", ""]
    parts += [f"- `{name}`: {meaning}" for name, meaning in WORRIES.items()]
    parts += ["", "## Rows with each worry", "", *_counts(rows), ""]
    parts += [
        f"## The {_HEAVIEST} heaviest rows of each target that have a fault or a worry",
        "",
        "Share: layers x roofline time of the row, out of that of all rows of the same target, dtype, network and",
        "batch, merged and not. Rows whose only worry is `few_programs` are left out: at batch 1 nearly all have it.",
        "",
        *_heaviest(rows),
    ]
    return "\n".join(parts) + "\n"


def shares(rows: list[dict]) -> list[float]:
    """Of each row: its layers x roofline time, out of the sum over its target, dtype, network and batch."""
    total: dict[tuple, float] = defaultdict(float)
    for row in rows:
        total[_group(row)] += _time_us(row)
    return [_time_us(row) / (total[_group(row)] or 1) for row in rows]


def _group(row: dict) -> tuple:
    return tuple(str(row[name]) for name in ("target", "dtype", "network", "batch"))


def _time_us(row: dict) -> float:
    return int(row["layers"]) * float(row["roofline_us"])


def _counts(rows: list[dict]) -> list[str]:
    found: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for row in rows:
        counter = found[row["target"], row["kernel"]]
        counter["rows"] += 1
        counter["faults"] += bool(row["faults"])
        counter.update(row["worries"].split())
    head = ["target", "kernel", "rows", "faults", *WORRIES]
    return _table(head, ([*key, *(counter[name] for name in head[2:])] for key, counter in found.items()))


def _heaviest(rows: list[dict]) -> list[str]:
    by_target = defaultdict(list)
    for row, share in zip(rows, shares(rows), strict=True):
        if row["faults"] or set(row["worries"].split()) - {"few_programs"}:
            by_target[row["target"]].append((share, row))
    lines = []
    for found in by_target.values():
        for share, row in sorted(found, key=lambda pair: -pair[0])[:_HEAVIEST]:
            cells = [f"{100 * share:.1f} %", f"{row['network']} x{row['batch']}"]
            cells += [
                row["dtype"],
                row["kernel"],
                _short(row["shape"]),
                row["tile"],
                row["faults"],
                row["worries"],
            ]
            lines.append([row["target"], *cells])
    return _table(
        ["target", "share", "network", "dtype", "kernel", "shape", "tile", "faults", "worries"], lines
    )


def _short(shape: str) -> str:
    """Without what an operator does not do."""
    return " ".join(word for word in shape.split() if not word.endswith(("=False", "=none")))


def _table(head: list[str], lines: Iterable[list]) -> list[str]:
    cells = [head, *([str(cell) for cell in line] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
