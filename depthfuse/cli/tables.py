"""Results as tables on standard output."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from depthfuse.benching.bench import table_rows as bench_rows
from depthfuse.checkpoint import load_json
from depthfuse.costs.inspection import BlockReport
from depthfuse.costs.table import CostTable
from depthfuse.rivals.compare_report import RESULTS, table_rows
from depthfuse.runs.report import comparison_rows
from depthfuse.selftest.run import STATES, Check


class ResultConsole(Console):
    """Standard output; wide where it is no terminal, so that no cell is cut."""

    def __init__(self) -> None:
        super().__init__(width=None if sys.stdout.isatty() else 160)

    def on_broken_pipe(self) -> NoReturn:
        """Leave it to `main`; rich would end the process, with an exit code of its own."""
        raise BrokenPipeError


def print_results(results: Mapping[Path, Mapping[str, Any]]) -> None:
    """The closing tables of runs, {folder: results document}."""
    console = ResultConsole()
    for directory, document in results.items():
        head, *rows = comparison_rows(document)
        title = f"{document['model']}, {len(document['choices'])} blocks merged ({directory})"
        console.print(_table(head, rows, title))
    console.print("* over the accelerated baseline, median of interleaved rounds")


def print_comparison(directory: Path) -> None:
    """The table of `depthfuse compare`, from its folder."""
    results = load_json(directory / "results.json", RESULTS)
    head, *rows = table_rows(results)
    ResultConsole().print(_table(head, rows, f"{results['model']} ({directory})"))


def print_checks(checks: Sequence[Check], title: str) -> None:
    """What a self-test has found, a case a line."""
    dtypes = list(dict.fromkeys(check.dtype for check in checks))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        share = "" if check.share is None else f", {check.share:.2f} of its bound"
        cells.setdefault((check.op, check.case), {})[check.dtype] = check.state + share
        if check.state != "passed":
            where = f"{check.op}, {check.case}, {check.dtype}"
            reasons.setdefault((check.state, check.reason), []).append(where)
    rows = [[op, case, *(by.get(dtype, "") for dtype in dtypes)] for (op, case), by in cells.items()]
    console = ResultConsole()
    console.print(_table(("op", "case", *dtypes), rows, title))
    for (state, reason), where in reasons.items():
        rest = f" and {len(where) - 1} more" if len(where) > 1 else ""
        console.print(f"{state}: {where[0]}{rest}: {reason}", markup=False)
    counts = Counter(check.state for check in checks)
    console.print(", ".join(f"{counts[state]} {state}" for state in STATES))


def print_inspection(model: str, blocks: Sequence[BlockReport], remark: str) -> None:
    """What can be pruned of a model, and what that saves."""
    head = (
        "block",
        "type",
        "merge candidate",
        "MACs",
        "merged",
        "parameters",
        "merged",
        "remark",
    )
    rows = []
    for block in blocks:
        numbers: Sequence[str] = ("", "", "", "")
        if block.candidate is not None:
            counts = (block.macs_before, block.macs_after, block.parameters_before, block.parameters_after)
            numbers = [f"{count:,}" for count in counts]
        rows.append([block.block, block.block_type, block.candidate or "-", *numbers, block.reason])
    console = ResultConsole()
    console.print(_table(head, rows, model))
    if remark:
        console.print(remark)


def print_latencies(table: CostTable, out: Path) -> None:
    """What merging each block saves, and the conditions of the measurement."""
    facts = table.conditions
    how = f"PREDICTED ({facts['source']})" if facts["predicted"] else "measured"
    threads = f", {facts['threads']} threads" if facts["threads"] else ""
    title = (
        f"{facts['model']}, {how}: {table.whole:.3f} ms accelerated; {facts['device']}{threads}, {facts['dtype']}, "
        f"batch {facts['batch_size']}, torch {facts['torch']}"
    )
    rows = [
        [path, name, table.saving_in_words(path, name), f"{100 * saved_ms / table.whole:.2f}"]
        for path, saved in table.saved.items()
        for name, saved_ms in saved.items()
    ]
    console = ResultConsole()
    console.print(_table(("block", "merge candidate", "saves ms", "% of the whole"), rows, title))
    console.print(f"table: {out}", soft_wrap=True)


def print_check(checked: Sequence[tuple[dict[str, str], float, float]], errors: Sequence[float]) -> None:
    """(choices, sum of the table in ms, measured ms) of whole subnets, and the relative errors of the sums."""
    rows = [
        [str(len(choices)), f"{predicted_ms:.3f}", f"{measured_ms:.3f}", f"{100 * error:.1f}"]
        for (choices, predicted_ms, measured_ms), error in zip(checked, errors, strict=True)
    ]
    console = ResultConsole()
    head = ("blocks merged", "sum ms", "measured ms", "error %")
    console.print(_table(head, rows, "random subnets as wholes"))
    mean, most = 100 * sum(errors) / len(errors), 100 * max(errors)
    console.print(f"relative error of the sums: mean {mean:.1f} %, largest {most:.1f} %")


def print_bench(rows: Sequence[Mapping[str, Any]], report: str, title: str, out: Path) -> None:
    """The operations' report, then all contenders side by side."""
    print_plain(report)
    head, *cells = bench_rows(rows)
    console = ResultConsole()
    console.print(_table(head, cells, title))
    console.print(f"tables, plot and page: {out}", soft_wrap=True)


def print_plain(text: str) -> None:
    """Text as it is: not wrapped, nothing read as markup."""
    ResultConsole().print(text, soft_wrap=True, highlight=False, markup=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    return table
