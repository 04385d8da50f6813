"""Tables and the figure of a comparison of methods (`depthfuse.rivals.compare`)."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthfuse.checkpoint import save_text
from depthfuse.reporting.figures import HEIGHT, Figure, legend_below, short
from depthfuse.reporting.style import SERIES, light, series
from depthfuse.rivals.methods import METHODS
from depthfuse.runs import report
from depthfuse.untrusted import Either

_MARKERS = "o^Dv"  # one after another, where there are more methods than colours
_NET = {
    "choices": dict[str, str] | None,
    "channel_ratio": float | None,
    "image_size": int | None,
    "top1": float,
    "loss": float,
    "baseline_top1": float,
    "macs": float,
    "parameters": float,
    "seconds": float,
}
_OF = {"method": str, "budget": str, "seed": int}
_UNREACHABLE = {**_OF, "unreachable": str}
# What trial.json holds: a net, or why there is none.
TRIAL: Any = Either(_UNREACHABLE, {**_OF, **_NET})
RESULTS = {
    "model": str,
    "conditions": {"device": str, "*": Any},
    "chosen_by": dict[str, Any],
    "baseline": {"macs": float, "parameters": int, "seconds": float, "latency_ms": float},
    "trials": [{**_OF, **_NET, "latency_ms": float, "speedup": float}],
    "unreachable": [_UNREACHABLE],
}


def summarise(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each budget and method: means and standard deviations over the seeds."""
    rows = []
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for trial in results["trials"]:
        groups.setdefault((trial["budget"], trial["method"]), []).append(trial)
    for (budget, name), trials in groups.items():
        lost = [t["top1"] - t["baseline_top1"] for t in trials]
        scores = [t["top1"] for t in trials]
        rows.append(
            {
                "budget": budget,
                "method": name,
                "seeds": len(trials),
                "top1": statistics.mean(scores),
                "top1_sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                "change": statistics.mean(lost),
                "change_sd": statistics.stdev(lost) if len(lost) > 1 else 0.0,
                "latency_ms": statistics.median(t["latency_ms"] for t in trials),
                "speedup": statistics.median(t["speedup"] for t in trials),
                "macs": statistics.mean(t["macs"] for t in trials),
                "parameters": statistics.mean(t["parameters"] for t in trials),
                "hours": statistics.mean(t["seconds"] for t in trials) / 3600,
            }
        )
    return rows


def table_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The closing table, first row its head."""
    head = ["budget", "method", "top-1 %", "change", "speed-up", "latency ms", "MACs", "parameters", "hours"]
    scores = list({t["seed"]: t["baseline_top1"] for t in results["trials"]}.values())
    base = results["baseline"]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    rows = [
        [
            "",
            "baseline",
            f"{statistics.mean(scores):.2f} ± {spread:.2f}",
            "",
            "1.00x",
            f"{base['latency_ms']:.3f}",
            f"{base['macs'] / 1e6:.2f} M",
            f"{base['parameters']:,}",
            f"{base['seconds'] / 3600:.3f}",
        ]
    ]
    for row in summarise(results):
        rows.append(
            [
                row["budget"],
                row["method"],
                f"{row['top1']:.2f} ± {row['top1_sd']:.2f}",
                f"{row['change']:+.2f} ± {row['change_sd']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['latency_ms']:.3f}",
                f"{row['macs'] / 1e6:.2f} M",
                f"{row['parameters']:,.0f}",
                f"{row['hours']:.3f}",
            ]
        )
    for budget, name in dict.fromkeys((t["budget"], t["method"]) for t in results["unreachable"]):
        rows.append([budget, name, "out of reach", *[""] * (len(head) - 3)])
    return [head, *rows]


def write(directory: Path, results: Mapping[str, Any]) -> None:
    """results.csv (every trial), report.md and its figure."""
    keys = ["budget", "method", "seed", "top1", "loss", "baseline_top1", "latency_ms", "speedup", "macs"]
    keys += ["parameters", "seconds", "channel_ratio", "image_size", "choices"]
    out = io.StringIO()
    writer = csv.DictWriter(out, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for trial in results["trials"]:
        choices = " ".join(f"{path}={name}" for path, name in (trial["choices"] or {}).items())
        writer.writerow({**trial, "choices": choices})
    save_text(directory / "results.csv", out.getvalue())
    comparison(results).save_png(directory / "comparison.png")
    save_text(directory / "report.md", markdown(results))


def markdown(results: Mapping[str, Any]) -> str:
    """The report as text."""
    head, *rows = table_rows(results)
    lines = [f"# {results['model']}: pruning methods under equal conditions", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    paragraphs = [
        legend(results),
        f"Measured with: {report.in_words(results['conditions'])}.",
        *report.chosen_by(results),
        "\n".join(f"- {name}: {text}" for name, text in methods_told(results).items()),
        "![comparison](comparison.png)",
    ]
    return "\n".join([*lines, "", *(f"{text}\n" for text in paragraphs)])


def methods_told(results: Mapping[str, Any]) -> dict[str, str]:
    """The methods that took part, and what each does."""
    names = dict.fromkeys(trial["method"] for trial in results["trials"])
    return {name: METHODS[name].text for name in names if name in METHODS}


def legend(results: Mapping[str, Any]) -> str:
    """What the columns of the table are."""
    seeds = sorted({t["seed"] for t in results["trials"]})
    return (
        f"Mean and standard deviation over the seeds {', '.join(map(str, seeds))}. Change: top-1 less the "
        "baseline's of the same seed. Speed-up: accelerated, over the accelerated baseline, round by round. Hours: "
        "wall time beside the baseline's training, search included."
    )


def comparison(results: Mapping[str, Any]) -> Figure:
    """Change in top-1 over speed-up, one colour a method, with the standard deviation over the seeds."""
    rows = summarise(results)
    names = list(dict.fromkeys(row["method"] for row in rows))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, name in enumerate(names):
            mine = [row for row in rows if row["method"] == name]
            control = name in METHODS and METHODS[name].control
            axes.errorbar(
                [row["speedup"] for row in mine],
                [row["change"] for row in mine],
                yerr=[row["change_sd"] for row in mine],
                fmt="s--" if control else f"{_MARKERS[i // len(SERIES) % len(_MARKERS)]}-",
                color=series(i),
                alpha=0.6 if control else 1.0,
                capsize=3,
                label=short(name, 28),
            )
        axes.axhline(0.0, color=light("muted"), lw=1)
        axes.set_xlabel("speed-up over the accelerated baseline")
        axes.set_ylabel("change in top-1 (points)")
        axes.set_title(short(f"{results['model']} on {results['conditions']['device']}"))
        legend_below(axes, columns=2)

    words = "Change in top-1 over speed-up, mean and standard deviation over the seeds; up and to the right is better."
    return Figure("Methods beside each other", words, draw, height=HEIGHT + 0.1 * len(names) + 0.3)
