"""What lies in a run's folder, finished or not, for its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthfuse.checkpoint import load_json
from depthfuse.config import PruneConfig
from depthfuse.costs.table import CostTable
from depthfuse.runs import finalists
from depthfuse.runs.feeding import load_feeding
from depthfuse.runs.report import HISTORY, MERGE, RESULTS
from depthfuse.searching.journal import Journal
from depthfuse.searching.search import SearchResult, found_in
from depthfuse.searching.space import budget_unit
from depthfuse.spec import SubnetSpec
from depthfuse.tasks import Task

TRAININGS = ("baseline", "supernet", "finetune")
# Each stage and what stands there when it is done; a search without a budget ends with the front.
_ARTEFACTS = {
    "baseline": "baseline.safetensors",
    "supernet": "supernet.safetensors",
    "search": "subnet.json",
    "finetune": "finetune.safetensors",
    "merge": "merged.safetensors",
    "compare": "results.json",
}


@dataclass(frozen=True)
class Findings:
    """A run's folder. What is not there (yet) is None or empty.

    given: which of task and data came from Python, so that no command repeats the run. done: each stage, and whether
    it is. choices: {block: candidate} of the subnet that was chosen. seconds: wall time of the trainings.
    """

    config: PruneConfig
    task: Task
    given: tuple[str, ...]
    done: Mapping[str, bool]
    results: Mapping[str, Any] | None
    table: CostTable | None
    search: SearchResult | None
    choices: Mapping[str, str] | None
    finalists: list[dict[str, Any]] | None
    merge: Mapping[str, Any] | None
    history: list[dict[str, Any]]
    seconds: Mapping[str, float]
    feeding: Mapping[str, Any] | None


def findings_of(folder: Path, config: PruneConfig, task: Task, given: tuple[str, ...] = ()) -> Findings:
    """Raises CheckpointError or SpecError for a file that is damaged."""

    def read(name: str, shape: Any) -> Any:
        return load_json(folder / name, shape) if (folder / name).exists() else None

    artefacts = _ARTEFACTS if budget_unit(config.search) else _ARTEFACTS | {"search": "front.csv"}
    table = CostTable.load(folder / "latency.json") if (folder / "latency.json").exists() else None
    spec = SubnetSpec.load(folder / "subnet.json") if (folder / "subnet.json").exists() else None
    journal, search = folder / "search.jsonl", None
    if table is not None and journal.exists():
        search = found_in(Journal(journal), table, config.search, spec)
    times = {name: read(f"seconds_{name}.json", float) for name in TRAININGS}
    entered = read(finalists.FILE, finalists.SHAPE)
    if entered:
        times["finalists"] = sum(row.get("seconds", 0.0) for row in entered)
    return Findings(
        config,
        task,
        given,
        {name: (folder / file).exists() for name, file in artefacts.items()},
        read("results.json", RESULTS),
        table,
        search,
        None if spec is None else spec.mapping(),
        entered,
        read("merge.json", MERGE),
        history_of(folder),
        {name: seconds for name, seconds in times.items() if seconds is not None},
        load_feeding(folder),
    )


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of all training stages that are done, in order."""
    paths = [folder / f"history_{stage}.json" for stage in TRAININGS]
    return [row for path in paths if path.exists() for row in load_json(path, HISTORY)]
