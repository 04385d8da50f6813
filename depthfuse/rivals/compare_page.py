"""report.html of `depthfuse compare`: pruning methods beside each other, on one page that needs nothing but itself."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from depthfuse._version import __version__
from depthfuse.config import CompareConfig, to_yaml
from depthfuse.reporting.markup import (
    code,
    facts,
    folded,
    grid,
    page,
    paragraph,
    section,
    table,
    tag,
    tiles,
)
from depthfuse.rivals.compare_report import comparison, legend, methods_told, summarise, table_rows
from depthfuse.rivals.methods import METHODS
from depthfuse.runs.report import chosen_by

FILE = "report.html"


def html(results: Mapping[str, Any], config: CompareConfig) -> str:
    """The page as text.

    Args:
        results: as in results.json. config: what it was made with.
    """
    head, *rows = table_rows(results)
    winners = _winners(results)
    named = {(row["budget"], row["method"]) for row in winners}
    best = [index for index, row in enumerate(rows) if (row[0], row[1]) in named]
    notes = [legend(results), *chosen_by(results)]
    conditions = {
        name.replace("_", " "): value for name, value in results["conditions"].items() if name != "predicted"
    }
    sections = [
        section(
            "results",
            "Results",
            table(head, rows, "Methods under equal conditions", strong=best),
            grid(
                comparison(results).piece(),
                tag("div", *(paragraph(text, kind="note") for text in notes)),
            ),
        ),
        section("methods", "What each method does", facts(methods_told(results))),
        section("unreached", "Out of reach", _unreached(results)),
        section("trials", "Every trial", _trials(results)),
        section(
            "reproduce",
            "How to repeat it",
            paragraph("Where it was started, as paths in the configuration may begin there:"),
            code(
                f"depthfuse compare --config={shlex.quote(f'{config.out}/config.yaml')} "
                f"--out {shlex.quote(f'{config.out}-again')}"
            ),
            folded("The whole configuration (config.yaml)", code(to_yaml(config))),
        ),
        section("machine", "Machine and versions", facts({"depthfuse": __version__, **conditions})),
    ]
    seeds = len({trial["seed"] for trial in results["trials"]})
    conditions_told = f"{seeds} seeds on {results['conditions']['device']}"
    intro = [paragraph(conditions_told, kind="lead"), _tiles(winners)]
    return page("depthfuse compare", results["model"], intro, sections)


def _pruning(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the methods that prune, the controls left out."""
    return [
        row
        for row in summarise(results)
        if row["method"] not in METHODS or not METHODS[row["method"]].control
    ]


def _winners(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row of best top-1 of each budget."""
    budgets: dict[str, list[dict[str, Any]]] = {}
    for row in _pruning(results):
        budgets.setdefault(row["budget"], []).append(row)
    return [max(rows, key=lambda row: row["top1"]) for rows in budgets.values()]


def _tiles(winners: Sequence[Mapping[str, Any]]) -> Element | None:
    cells = [
        (
            f"Best top-1 at {row['budget']}",
            row["method"],
            f"{row['top1']:.2f} ± {row['top1_sd']:.2f} % ({row['change']:+.2f} points) at {row['speedup']:.2f}x",
        )
        for row in winners
    ]
    return tiles(cells) if cells else None


def _unreached(results: Mapping[str, Any]) -> Element | None:
    cells = [
        [trial["budget"], trial["method"], str(trial["seed"]), trial["unreachable"]]
        for trial in results["unreachable"]
    ]
    return table(["budget", "method", "seed", "why"], cells, "Budgets that a method did not reach")


def _trials(results: Mapping[str, Any]) -> Element | None:
    cells = [
        [
            trial["budget"],
            trial["method"],
            str(trial["seed"]),
            f"{trial['top1']:.2f}",
            f"{trial['baseline_top1']:.2f}",
            f"{trial['speedup']:.2f}x",
            f"{trial['latency_ms']:.3f}",
            " ".join(f"{path}={name}" for path, name in (trial["choices"] or {}).items()),
        ]
        for trial in results["trials"]
    ]
    head = ["budget", "method", "seed", "top-1 %", "baseline's", "speed-up", "latency ms", "choices"]
    return folded(f"{len(cells)} trials", table(head, cells, "One net each")) if cells else None
