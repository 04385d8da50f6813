"""What the microbenchmarks leave behind: a CSV that grows case by case, one line for each case, a plot an operator."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path

import torch

from benchmarks.kernels.cases import Case
from depthfuse.devices import device_name
from depthfuse.env import collect

ROOT = Path(__file__).resolve().parents[2]


def source_digest() -> str:
    """Of every source that a number depends on: a speed counts only for the code that was tested."""
    digest = hashlib.sha256()
    for folder in ("kernels", "depthfuse/ops", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Table:
    """The CSV of one device, dtype and set of versions. It is whole after every case, so that a stopped run goes on.

    Rows measured with other sources than those at hand are dropped.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: str) -> None:
        triton = collect()["versions"]["triton"] or "none"
        self.machine = {
            "device": device_name(device),
            "threads": "" if device.type == "cuda" else str(torch.get_num_threads()),
            "torch": torch.__version__,
            "triton": triton,
            "source": source_digest(),
        }
        names = (self.machine["device"], dtype, f"torch{torch.__version__}", f"triton{triton}")
        self.path = folder / ("micro_" + "_".join(re.sub(r"[^\w.+-]+", "-", name) for name in names) + ".csv")
        self.rows: list[dict] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if row["source"] == self.machine["source"]]

    def has(self, case: Case, contenders: list[str]) -> bool:
        """Whether the case was measured with at least these contenders."""
        return any(
            row["op"] == case.op
            and row["shape"] == case.shape()
            and set(contenders) <= set(row["asked"].split())
            for row in self.rows
        )

    def add(self, rows: list[dict]) -> None:
        """Put the rows of one case in, in place of those that there were of it, and write the file anew."""
        op, shape = rows[0]["op"], rows[0]["shape"]
        self.rows = [row for row in self.rows if (row["op"], row["shape"]) != (op, shape)]
        self.rows += [row | self.machine for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[-1]))
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)

    def plot(self) -> list[Path]:
        """One image for each operator beside the CSV; returns all that was written, the CSV too."""
        written = [self.path] if self.rows else []
        for op in sorted({row["op"] for row in self.rows}):
            path = self.path.with_name(f"{self.path.stem}_{op}.png")
            plot([row for row in self.rows if row["op"] == op], path)
            written.append(path)
        return written


def summary(rows: list[dict], ours: str) -> str:
    """A case in one line: latency and share of the roofline by contender, and the best of the others against ours."""
    parts = [
        f"{row['contender']} {row['latency_us']:.1f} us ({row['percent_of_roofline']:.0f} %)" for row in rows
    ]
    others = [row["ratio_to_ours"] for row in rows if row["contender"] != ours]
    best = f"   the best other takes {min(others):.2f}x the time of {ours}" if others else ""
    return f"{rows[0]['op']} {rows[0]['shape']}: {', '.join(parts)}{best}"


def plot(rows: list[dict], path: Path) -> None:
    """Percent of the roofline, with quartiles, over the time that the roofline allows; a colour for each contender.

    Args:
        rows: of benchmarks/micro.py, of one operator; numbers may still be text, as a CSV holds them.
        path: of the image to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for contender in dict.fromkeys(row["contender"] for row in rows):
        chosen = [row for row in rows if row["contender"] == contender]
        least_us = [float(row["roofline_us"]) for row in chosen]
        middle, low, high = (
            [100 * least / float(row[name]) for least, row in zip(least_us, chosen, strict=True)]
            for name in ("latency_us", "latency_q3_us", "latency_q1_us")
        )
        spread = [
            [max(0.0, m - v) for m, v in zip(middle, low, strict=True)],
            [max(0.0, v - m) for m, v in zip(middle, high, strict=True)],
        ]
        axes.errorbar(
            least_us, middle, yerr=spread, fmt="o", markersize=4, capsize=2, alpha=0.8, label=contender
        )
    axes.set_xscale("log")
    axes.set_xlabel(f"time at the roofline, us ({rows[0]['roofline']})")
    axes.set_ylabel("% of the roofline (higher is faster)")
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    first = rows[0]
    axes.set_title(
        f"{first['op']}, {first['dtype']}, {first['device']}, torch {first['torch']}, triton {first['triton']}",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
