"""What a run leaves for people: report.md, metrics.csv and plots."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depthfuse.config import SearchConfig
from depthfuse.costs.table import CostTable
from depthfuse.merging.merge import MergeReport
from depthfuse.searching.intervals import points_lost, wilson
from depthfuse.searching.search import SearchResult
from depthfuse.searching.space import TOLERANCE, budget_unit
from depthfuse.tasks import AGREEMENT, CLASSIFICATION, Task
from depthfuse.training.loop import history_csv
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
MERGE = {"summary": str, "output": float}
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


def write(directory: Path, results: Mapping[str, Any], history: Sequence[Row], task: Task) -> None:
    """Write report.md, metrics.csv and the PNG plots into `directory`."""
    (directory / "metrics.csv").write_text(history_csv(list(history)))
    plots = directory / "plots"
    plots.mkdir(exist_ok=True)
    _plot_comparison(results, plots / "comparison.png")
    _plot_blocks(results, plots / "blocks.png")
    if history:
        _plot_training(history, plots / "training.png", task)
    (directory / "report.md").write_text(markdown(results))


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
    conditions = in_words(results["conditions"])
    lines += [
        "",
        *_budget_in_words(results),
        "\\* over the accelerated baseline; medians of interleaved rounds, ratio taken round by round.",
        "",
        *_agreement_in_words(results),
        f"Measured with: {conditions}.",
        "",
        *chosen_by(results),
        *_noise_in_words(results),
        f"Pruned {len(results['choices'])} of {len(results['blocks'])} prunable blocks:",
        "",
        *(f"- `{block}`: {candidate}" for block, candidate in results["choices"].items()),
        "",
        *([f"Check of the merge: {results['merge']}.", ""] if results.get("merge") else []),
        "![comparison](plots/comparison.png)",
        "![training](plots/training.png)",
        "![blocks](plots/blocks.png)",
        "",
    ]
    return "\n".join(lines)


def _budget_in_words(results: Mapping[str, Any]) -> list[str]:
    """Said only where the budget was not met, or could not be checked."""
    if missed := budget_missed(results):
        return [f"**{missed[0].upper()}{missed[1:]}.**", ""]
    budget = results.get("budget")
    if budget is not None and budget["met"] is None:
        return [
            f"{_named(budget)} holds for the machine that was pruned for, and cannot be checked here.",
            "",
        ]
    return []


def _agreement_in_words(results: Mapping[str, Any]) -> list[str]:
    """Said only where the images had no classes."""
    if metric_of(results) != AGREEMENT.metric:
        return []
    return [
        "The images have no classes: agreement is the share of them to which a net gives the baseline's own answer, "
        "right or wrong.",
        "",
    ]


def in_words(conditions: Mapping[str, Any]) -> str:
    """Conditions of a measurement as a list for a sentence."""
    told = {k: v for k, v in conditions.items() if v not in (None, {}, []) and k != "predicted"}
    return ", ".join(f"{k} {v}" for k, v in told.items())


def chosen_by(results: Mapping[str, Any]) -> list[str]:
    """Said only where the subnet was chosen by other latencies than the closing comparison's."""
    table = results.get("chosen_by", results["conditions"])
    if table.get("predicted"):
        return [
            f"The subnet was chosen by PREDICTED latencies, not by measured ones: {in_words(table)}.",
            "",
        ]
    if table != results["conditions"]:
        return [
            f"The subnet was chosen by latencies measured under other conditions: {in_words(table)}.",
            "",
        ]
    return []


def _noise_in_words(results: Mapping[str, Any]) -> list[str]:
    """Said only where the latency table is noisy."""
    noisy = results.get("noisy_latencies", [])
    if not noisy:
        return []
    return [
        f"{len(noisy)} of the latencies that the subnet was chosen by are NOISY, as of a busy machine: "
        f"{', '.join(noisy)}.",
        "",
    ]


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    path.write_bytes(buffer.getvalue())


def _plot_comparison(results: Mapping[str, Any], path: Path) -> None:
    rows = results["rows"]
    figure = new_figure(7.5, 4.5)
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        low, high = row["latency_quartiles_ms"]
        middle = row["latency_ms"]
        spread = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        axes.errorbar(
            middle, row["top1"], xerr=spread, fmt="o", ms=9, color=f"C{i}", capsize=3, label=row["net"]
        )
    axes.set_xlabel("latency (ms), median and quartiles")
    axes.set_ylabel(f"{metric_of(results)} (%)")
    axes.set_title(f"{results['model']} on {results['conditions']['device']}")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def plot_front(directory: Path, result: SearchResult, table: CostTable, model: str, metric: str) -> None:
    """plots/front.png: the metric on held-out images of the supernet's best subnets over what they cost."""
    figure = new_figure(7.0, 4.5)
    axes = figure.add_subplot()
    axes.plot([p.cost for p in result.front], [p.top1 for p in result.front], "o-", label="best subnets")
    _plot_intervals(axes, result)
    axes.axvline(table.whole, color="grey", ls="--", label="baseline")
    predicted = " (predicted)" if table.conditions.get("predicted") else ""
    axes.set_xlabel(f"{'latency' if table.unit == 'ms' else 'cost'} ({table.unit}){predicted}")
    axes.set_ylabel(f"{metric} on held-out images (%), before fine-tuning")
    axes.set_title(f"{model} on {table.conditions.get('device')}: {result.scored} subnets scored")
    axes.grid(alpha=0.3)
    axes.legend()
    plots = directory / "plots"
    plots.mkdir(exist_ok=True)
    save_figure(figure, plots / "front.png")


def _plot_intervals(axes: Any, result: SearchResult) -> None:
    """95 % intervals of the scores, and of their differences to the unpruned net, which are the narrower ones."""
    known = [(p, p.pair) for p in result.front if p.pair is not None]
    if not known or result.unpruned is None:
        return
    ends = [wilson(p.top1, pair.images) for p, pair in known]
    lost = [points_lost(pair)[1:] for _, pair in known]
    beside = [(result.unpruned - most, result.unpruned - least) for least, most in lost]
    for spans, width, color, label in (
        (beside, 5.0, "C1", "95 %: beside the unpruned net"),
        (ends, 1.5, "C0", "95 %: of the score alone"),
    ):
        # not centred on the scores, as error bars would be
        costs, lows, highs = (
            [p.cost for p, _ in known],
            [low for low, _ in spans],
            [high for _, high in spans],
        )
        axes.vlines(costs, lows, highs, lw=width, color=color, alpha=0.6, label=label)
    axes.axhline(result.unpruned, color="grey", ls=":", label="unpruned net, in the supernet")


def _plot_training(history: Sequence[Row], path: Path, task: Task) -> None:
    stages = list(dict.fromkeys(row["stage"] for row in history))
    figure = new_figure(4.5 * len(stages), 4.0)
    for i, stage in enumerate(stages):
        rows = [row for row in history if row["stage"] == stage]
        axes = figure.add_subplot(1, len(stages), i + 1)
        losses = [(row["iteration"], row["loss"]) for row in rows if "loss" in row]
        axes.plot(*zip(*losses, strict=True), color="C0", lw=1, label="loss")
        axes.set_xlabel("iteration")
        axes.set_ylabel("loss")
        axes.set_title(stage)
        other = axes.twinx()
        lams = [(row["iteration"], 100 * row["lambda"]) for row in rows if "lambda" in row]
        if lams:
            other.plot(*zip(*lams, strict=True), color="C1", ls="--", label="lambda x 100")
        for j, key in enumerate(sorted({k for row in rows for k in row if k.startswith(task.key)})):
            points = [(row["iteration"], row[key]) for row in rows if key in row]
            other.plot(*zip(*points, strict=True), color=f"C{j + 2}", marker=".", label=key)
        other.set_ylim(0, 100)
        other.set_ylabel(f"{task.metric} (%), lambda x 100")
        handles = [h for a in (axes, other) for h in a.get_legend_handles_labels()[0]]
        other.legend(handles, [h.get_label() for h in handles], fontsize=8, loc="lower center")
    save_figure(figure, path)


def _plot_blocks(results: Mapping[str, Any], path: Path) -> None:
    blocks = list(results["blocks"])
    chosen = results["choices"]
    figure = new_figure(max(5.0, 0.45 * len(blocks) + 2), 2.6)
    axes = figure.add_subplot()
    forms = ["keep", *dict.fromkeys(chosen.values())]
    for i, block in enumerate(blocks):
        form = chosen.get(block, "keep")
        axes.bar(i, 1, color="lightgrey" if form == "keep" else f"C{forms.index(form)}", edgecolor="black")
        axes.text(i, 0.5, form, rotation=90, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=7)
    axes.set_yticks([])
    axes.set_title(f"{len(chosen)} of {len(blocks)} prunable blocks merged")
    save_figure(figure, path)
