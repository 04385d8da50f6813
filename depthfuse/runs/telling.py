"""What a run writes for people: the report, metrics.csv, plots and the page, of what lies in its folder."""

from __future__ import annotations

import logging
from pathlib import Path

from depthfuse.checkpoint import load_json, save_text
from depthfuse.config import PruneConfig
from depthfuse.costs.table import CostTable
from depthfuse.runs import figures, found, page, report
from depthfuse.searching.search import SearchResult, front_csv
from depthfuse.tasks import Task
from depthfuse.training.loop import history_csv

log = logging.getLogger(__name__)


def tell_front(folder: Path, result: SearchResult, latency: CostTable, model: str, task: Task) -> None:
    """front.csv and its plot, of a search."""
    save_text(folder / "front.csv", front_csv(result, latency, task))
    figures.front(result, latency, model, task.metric).save_png(folder / "plots" / "front.png")


def tell_results(folder: Path, task: Task) -> None:
    """report.md, metrics.csv and the plots of a run that is done; a budget that was missed is said."""
    results = load_json(folder / "results.json", report.RESULTS)
    if missed := report.budget_missed(results):
        log.warning("%s; what was written is valid all the same", missed)
    history = found.history_of(folder)
    save_text(folder / "metrics.csv", history_csv(history))
    drawn = {"comparison": figures.comparison(results), "blocks": figures.blocks(results)}
    if history:
        drawn["training"] = figures.training(history, task)
    for name, figure in drawn.items():
        figure.save_png(folder / "plots" / f"{name}.png")
    save_text(folder / "report.md", report.markdown(results))


def tell_page(folder: Path, config: PruneConfig, task: Task, given: tuple[str, ...]) -> None:
    """report.html, of what is there so far. given: see `found.Findings`."""
    save_text(folder / page.FILE, page.html(found.findings_of(folder, config, task, given)))
