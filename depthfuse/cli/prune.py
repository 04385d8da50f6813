"""`depthfuse prune`, each of its stages as a command, and `depthfuse demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from depthfuse import log
from depthfuse.cli.command import BUDGET_MISSED, Invocation


def prune(invocation: Invocation) -> int | None:
    directory = _run_until("compare", invocation)
    return close([directory]) if log.is_main_process() else None


def baseline(invocation: Invocation) -> None:
    _run_until("baseline", invocation)


def supernet(invocation: Invocation) -> None:
    _run_until("supernet", invocation)


def search(invocation: Invocation) -> None:
    _run_until("search", invocation)


def finetune(invocation: Invocation) -> None:
    _run_until("finetune", invocation)


def merge(invocation: Invocation) -> None:
    _run_until("merge", invocation)


def _run_until(stage: str, invocation: Invocation) -> Path:
    """The job up to a stage; returns its folder."""
    from depthfuse.config import PruneConfig

    settings = invocation.settings(PruneConfig)
    from depthfuse.runs import run

    return run.prune(settings, until=stage).dir


@dataclass
class DemoArguments:
    out: Path = Path("runs/demo")
    """Where the two runs go."""


def demo(invocation: Invocation) -> int | None:
    given = invocation.settings(DemoArguments)
    from depthfuse.runs import demo

    return close(demo.demo(given.out))


def close(directories: Sequence[Path]) -> int | None:
    """Print the results of finished runs, and say where a budget was missed."""
    from depthfuse.checkpoint import load_json
    from depthfuse.cli.tables import print_results
    from depthfuse.runs.report import RESULTS, budget_missed

    results = {directory: load_json(directory / "results.json", RESULTS) for directory in directories}
    print_results(results)
    missed = {directory: budget_missed(found) for directory, found in results.items()}
    for directory, how in missed.items():
        if how is not None:
            sys.stderr.write(f"depthfuse: {directory}: {how}\n")
    return BUDGET_MISSED if any(how is not None for how in missed.values()) else None
