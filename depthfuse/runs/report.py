"""What a run has found, in numbers and words, for report.md, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depthfuse.acceleration import Report
from depthfuse.config import SearchConfig
from depthfuse.merging.merge import MergeReport
from depthfuse.searching.space import TOLERANCE, budget_unit
from depthfuse.tasks import AGREEMENT, CLASSIFICATION
from depthfuse.untrusted import Either, Positive

Row = Mapping[str, Any]

# Medians of interleaved rounds repeat no better than this; counts are exact.
_MEASURED_WITHIN = 0.01
# Where the closing table shows a budget: by the search's setting, the column and how it is written there.
_BUDGET_CELLS = {
    "blocks": (0, "{:.0f} blocks"),
    "budget_ms": (4, "<= {:.3f}"),
    "speedup": (5, ">= {:.2f}x"),
    "macs": (3, "<= {:.2%}"),
    "parameters": (2, "<= {:.2%}"),
    "points": (1, "loses <= {:.2f}"),
}

# What `acceleration_document` makes of a report.
_COSTS = ("latency_ms", "before_ms", "MACs", "bytes", "roofline_ms", "roofline_%", "error")
OPERATION = {
    **{"path": str, "op": str, "implementation": str, "epilogue?": str, "absorbed?": str},
    **{f"{name}?": float | None for name in _COSTS},
}
ACCELERATED = {
    "executor": str,
    "whole": str | None,
    "fused": int,
    "absorbed": int,
    "unfused": int,
    "max_relative_error": float | None,
    "engines": dict[str, float],
    "latency_ms": dict[str, float],
    "operations": [OPERATION],
}
# What the files of a run hold; a reader checks it.
_CONDITIONS = {"device": str, "input_size": [int], "*": Any}
RESULTS = {
    "model": str,
    "metric?": str,  # what "top1" holds where the task is not classification; it keeps the name of the first task
    "conditions": _CONDITIONS,
    "chosen_by?": dict[str, Any],
    "rows": [
        {
            "net": str,
            "top1": float,
            "parameters": int,
            "macs": float,
            "latency_ms": Positive,
            "latency_quartiles_ms": [float],
            "speedup": Positive,
        }
    ],
    "choices": dict[str, str],
    "blocks": dict[str, Any],
    "merge?": str,
    "accelerated?": {"*": ACCELERATED},  # of the two accelerated nets
    "versions?": dict[str, str],
    "noisy_latencies?": [str],
    "budget?": Either(
        None,
        {
            "name": str,
            "unit": str,
            "wanted": float,
            "reached": float | None,
            "met": bool | None,
        },
    ),
}
MERGE = {
    "summary": str,
    "output": float,
    "folded_norms?": int,
    "blocks?": [{"block": str, "candidate": str, "border": float, "interior": float}],
}
HISTORY = [{"stage": str, "iteration": int, "*": float | str | None}]


def merge_document(merged: MergeReport) -> dict[str, Any]:
    """A merge report as JSON."""
    blocks = [
        {"block": b.path, "candidate": b.candidate, "border": b.border, "interior": b.interior}
        for b in merged.blocks
    ]
    return {
        "summary": str(merged),
        "output": merged.output,
        "folded_norms": merged.folded_norms,
        "blocks": blocks,
    }


def acceleration_document(report: Report) -> dict[str, Any]:
    """A report of `accelerate`, with or without costs of its operations, as JSON."""
    return {
        "executor": report.executor,
        "whole": report.whole,
        "fused": report.fused_count,
        "absorbed": report.absorbed_count,
        "unfused": report.unfused_count,
        "max_relative_error": report.max_relative_error,
        "engines": dict(report.engines),
        "latency_ms": dict(report.latency_ms),
        "operations": report.rows(),
    }


def check_budget(
    search: SearchConfig, rows: Sequence[Row], choices: Mapping[str, str], here: bool
) -> dict[str, Any] | None:
    """The budget beside what came out: {"name", "unit", "wanted", "reached", "met"}; None where none was set.

    Times are those measured of the whole merged and accelerated model; MACs and parameters are shares of the
    baseline's, counted; points are what it loses against the baseline on the validation images.

    Args:
        rows: of the closing comparison, see `Run`. choices: {block: candidate} of the pruned blocks.
        here: whether the latencies that the subnet was chosen by are this machine's. Where they are not, budgets in
            time cannot be checked: "reached" and "met" are None.
    """
    if budget_unit(search) is None:
        return None
    by_net = {row["net"]: row for row in rows}
    baseline, fast = by_net["baseline"], by_net["merged accelerated"]
    name, wanted = next((n, value) for n in _BUDGET_CELLS if (value := getattr(search, n)) is not None)
    if name == "blocks":
        unit, reached = "blocks", len(choices)
        met = reached == wanted
    elif name == "speedup":
        unit, reached = "x", fast["speedup"]
        met = reached >= wanted * (1 - _MEASURED_WITHIN)
    elif name == "budget_ms":
        unit, reached = "ms", fast["latency_ms"]
        met = reached <= wanted * (1 + _MEASURED_WITHIN)
    elif name == "points":
        unit, reached = "points", baseline["top1"] - fast["top1"]
        met = reached <= wanted + TOLERANCE
    else:  # a share
        unit, reached = f"of the baseline's {budget_unit(search)}", fast[name] / baseline[name]
        met = reached <= wanted * (1 + TOLERANCE)
    known = here or name not in ("speedup", "budget_ms")
    return {
        "name": name,
        "unit": unit,
        "wanted": wanted,
        "reached": reached if known else None,
        "met": met if known else None,
    }


def budget_missed(results: Mapping[str, Any]) -> str | None:
    """What to say where the measured result misses its budget; None where it is met or cannot be checked."""
    budget = results.get("budget")
    if budget is None or budget["met"] is not False:
        return None
    return f"the budget was missed: {_named(budget)} was asked for, {budget['reached']:.4g} {budget['unit']} came out"


def _named(budget: Mapping[str, Any]) -> str:
    return f"search.{budget['name']}={budget['wanted']:g}"


def metric_of(results: Mapping[str, Any]) -> str:
    return results.get("metric", CLASSIFICATION.metric)


def comparison_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The closing table, first row its head; the last one is the budget."""
    head = ["net", f"{metric_of(results)} %", "parameters", "MACs", "latency ms", "speed-up*"]
    rows = [
        [
            row["net"],
            f"{row['top1']:.2f}",
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:.2f} M",
            f"{row['latency_ms']:.3f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in results["rows"]
    ]
    budget = results.get("budget")
    if budget is not None:
        column, text = _BUDGET_CELLS[budget["name"]]
        said = {True: "budget (met)", False: "budget (MISSED)", None: "budget (of another machine)"}
        cells = [said[budget["met"]], *[""] * (len(head) - 1)]
        wanted = text.format(budget["wanted"])
        cells[column] = f"{cells[column]}: {wanted}" if column == 0 else wanted
        rows.append(cells)
    return [head, *rows]


def markdown(results: Mapping[str, Any]) -> str:
    """The report as text."""
    head, *rows = comparison_rows(results)
    lines = [f"# {results['model']}: pruned, merged, accelerated", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    missed = budget_missed(results)
    paragraphs = [
        *([f"**{missed[0].upper()}{missed[1:]}.**"] if missed else []),
        f"\\{FOOTNOTE}",
        *remarks(results),
        f"Pruned {len(results['choices'])} of {len(results['blocks'])} prunable blocks:",
        "\n".join(f"- `{block}`: {candidate}" for block, candidate in results["choices"].items()),
        *([f"Check of the merge: {results['merge']}."] if results.get("merge") else []),
        "![comparison](plots/comparison.png)\n![training](plots/training.png)\n![blocks](plots/blocks.png)",
    ]
    return "\n".join([*lines, "", *(f"{text}\n" for text in paragraphs)])


FOOTNOTE = "* over the accelerated baseline; medians of interleaved rounds, ratio taken round by round."


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the closing table has to know, one sentence each."""
    said = []
    budget = results.get("budget")
    if budget is not None and budget["met"] is None:
        said.append(
            f"{_named(budget)} holds for the machine that was pruned for, and cannot be checked here."
        )
    if metric_of(results) == AGREEMENT.metric:
        said.append(
            "The images have no classes: agreement is the share of them to which a net gives the baseline's own "
            "answer, right or wrong."
        )
    noisy = results.get("noisy_latencies", [])
    return [
        *said,
        f"Measured with: {in_words(results['conditions'])}.",
        *chosen_by(results),
        *(
            [
                f"{len(noisy)} of the latencies that the subnet was chosen by are NOISY, as of a busy machine: "
                f"{', '.join(noisy)}."
            ]
            if noisy
            else []
        ),
    ]


def in_words(conditions: Mapping[str, Any]) -> str:
    """Conditions of a measurement as a list for a sentence."""
    told = {k: v for k, v in conditions.items() if v not in (None, {}, []) and k != "predicted"}
    return ", ".join(f"{k} {v}" for k, v in told.items())


def chosen_by(results: Mapping[str, Any]) -> list[str]:
    """Said only where the subnet was chosen by other latencies than the closing comparison's."""
    table = results.get("chosen_by", results["conditions"])
    if table.get("predicted"):
        return [f"The subnet was chosen by PREDICTED latencies, not by measured ones: {in_words(table)}."]
    if table != results["conditions"]:
        return [f"The subnet was chosen by latencies measured under other conditions: {in_words(table)}."]
    return []
