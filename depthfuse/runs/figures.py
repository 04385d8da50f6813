"""The figures of a run: drawn once, for report.md as PNG files and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depthfuse.costs.table import CostTable
from depthfuse.reporting.figures import HEIGHT, Figure, legend_below, short
from depthfuse.reporting.style import light, series
from depthfuse.runs.report import metric_of
from depthfuse.searching.intervals import points_lost, wilson
from depthfuse.searching.search import SearchResult
from depthfuse.tasks import Task

Row = Mapping[str, Any]


def comparison(results: Mapping[str, Any]) -> Figure:
    """The metric over the latency of all nets of the closing comparison."""
    metric = metric_of(results)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for i, row in enumerate(results["rows"]):
            low, high = row["latency_quartiles_ms"]
            middle = row["latency_ms"]
            spread = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            last = i == len(results["rows"]) - 1
            axes.errorbar(
                middle,
                row["top1"],
                xerr=spread,
                fmt="o",
                ms=9 if last else 7,
                color=light("after") if last else series(i + 1),
                capsize=3,
                label=row["net"],
            )
        axes.set_xlabel("latency (ms), median and quartiles")
        axes.set_ylabel(f"{metric} (%)")
        axes.set_title(short(f"{results['model']} on {results['conditions']['device']}"))
        axes.set_xlim(left=0)
        axes.margins(y=0.15)
        legend_below(axes)

    words = f"{metric} over latency of the nets of the table; left of and above another is better."
    return Figure("Accuracy and latency", words, draw)


def front(
    result: SearchResult, table: CostTable, model: str, metric: str, chosen: Mapping[str, str] | None = None
) -> Figure:
    """The metric on held-out images of the supernet's best subnets over what they cost.

    chosen: the choices of the subnet that was taken, which is marked.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        _draw_intervals(axes, result)
        best = [(p.cost, p.top1) for p in result.front]
        axes.plot(*zip(*best, strict=True), "o-", color=light("merged"), label="best subnets")
        axes.axvline(table.whole, color=light("before"), ls="--", lw=1, label="baseline")
        taken = [(p.cost, p.top1) for p in result.front if chosen and dict(p.choices) == dict(chosen)]
        if taken:
            looks = {"mfc": "none", "mec": light("after"), "mew": 2.2, "ms": 13, "ls": "none"}
            axes.plot(*zip(*taken, strict=True), "o", label="chosen", **looks)
        predicted = " (predicted)" if table.conditions.get("predicted") else ""
        axes.set_xlabel(f"{'latency' if table.unit == 'ms' else 'cost'} ({table.unit}){predicted}")
        axes.set_ylabel(f"{metric} on held-out images (%)")
        axes.set_title(short(f"{model} on {table.conditions.get('device')}"))
        legend_below(axes, columns=2)

    words = (
        f"The {result.scored} subnets that the search scored: those that no other beats in both {metric} and cost, "
        "before fine-tuning."
    )
    return Figure("Pareto front", words, draw)


def _draw_intervals(axes: Any, result: SearchResult) -> None:
    """95 % intervals of the scores, and of their differences to the unpruned net, which are the narrower ones."""
    known = [(p, p.pair) for p in result.front if p.pair is not None]
    if not known or result.unpruned is None:
        return
    ends = [wilson(p.top1, pair.images) for p, pair in known]
    lost = [points_lost(pair)[1:] for _, pair in known]
    beside = [(result.unpruned - most, result.unpruned - least) for least, most in lost]
    for spans, width, colour, label in (
        (beside, 5.0, "dropped", "95 %: beside the unpruned net"),
        (ends, 1.5, "merged", "95 %: of the score alone"),
    ):
        # not centred on the scores, as error bars would be
        costs, lows, highs = (
            [p.cost for p, _ in known],
            [low for low, _ in spans],
            [high for _, high in spans],
        )
        axes.vlines(costs, lows, highs, lw=width, color=light(colour), alpha=0.45, label=label)
    axes.axhline(result.unpruned, color=light("before"), ls=":", lw=1, label="unpruned net, in the supernet")


def stages_of(history: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by training stage, in order."""
    found: dict[str, list[Row]] = {}
    for row in history:
        found.setdefault(row["stage"], []).append(row)
    return found


def training(history: Sequence[Row], task: Task) -> Figure:
    """All stages side by side."""
    stages = stages_of(history)

    def draw(figure: Any) -> None:
        for i, (stage, rows) in enumerate(stages.items()):
            _draw_stage(figure.add_subplot(1, len(stages), i + 1), stage, rows, task)

    return Figure("Training", "Loss, lambda and accuracy.", draw, width=4.5 * len(stages), height=4.0)


def stage(name: str, rows: Sequence[Row], task: Task) -> Figure:
    """One training stage: loss, lambda and the metric over iterations."""
    said = ", λ" if any("lambda" in row for row in rows) else ""
    words = f"Stage {name}: loss{said} and {task.metric} over iterations."
    return Figure(
        f"Training: {name}", words, lambda figure: _draw_stage(figure.add_subplot(), name, rows, task)
    )


def _draw_stage(axes: Any, stage: str, rows: Sequence[Row], task: Task) -> None:
    def plot(on: Any, key: str, colour: str, factor: float = 1.0, **looks: Any) -> None:
        points = [
            (row["iteration"], factor * row[key]) for row in rows if isinstance(row.get(key), int | float)
        ]
        if points:
            on.plot(*zip(*points, strict=True), color=colour, **looks)

    plot(axes, "loss", light("before"), lw=1.2, label="loss")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    axes.set_title(short(stage))
    metrics = sorted({key for row in rows for key in row if key.startswith(task.key)})
    mixes = any("lambda" in row for row in rows)
    if not metrics and not mixes:
        return
    other = axes.twinx()
    other.grid(False)
    other.spines["right"].set_visible(True)
    plot(other, "lambda", light("dropped"), 100.0, ls="--", label="λ × 100")
    for j, key in enumerate(metrics):
        plot(other, key, series(j), marker="o", ms=3.5, label=short(key, 28))
    other.set_ylim(0, 103)
    other.set_ylabel(f"{task.metric} (%){', λ × 100' if mixes else ''}")
    handles = [handle for a in (axes, other) for handle in a.get_legend_handles_labels()[0]]
    legend_below(axes, handles)


def blocks(results: Mapping[str, Any]) -> Figure:
    """What became of each prunable block; the page draws the net itself."""
    names, chosen = list(results["blocks"]), results["choices"]
    forms = ["keep", *dict.fromkeys(chosen.values())]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.grid(False)
        for i, block in enumerate(names):
            form = chosen.get(block, "keep")
            colour = light("line") if form == "keep" else series(forms.index(form))
            axes.bar(i, 1, color=colour, edgecolor=light("surface"))
            ink = light("ink" if form == "keep" else "surface")
            axes.text(i, 0.5, short(form, 16), rotation=90, ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(len(names)), [short(name, 32) for name in names], rotation=90, fontsize=7)
        axes.set_yticks([])
        axes.set_title(f"{len(chosen)} of {len(names)} prunable blocks merged")

    return Figure(
        "Blocks", "What became of each block.", draw, max(5.0, 0.45 * len(names) + 2), 0.75 * HEIGHT
    )
