"""The page of `depthfuse bench`: a net beside every engine that a user could run it with instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depthfuse._version import __version__
from depthfuse.acceleration import Report
from depthfuse.benching.bench import Row, ratios, table_rows
from depthfuse.benching.engines import OURS
from depthfuse.reporting.markup import facts, grid, page, paragraph, section, table, tiles
from depthfuse.reporting.operations import by_kind, one_by_one


def html(rows: Sequence[Row], operations: Report, model: str, machine: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        rows: of `bench.compare`, of one model, for one batch size or several. operations: of `bench.operations`.
        machine: of `bench.machine`.
    """
    head, *cells = table_rows(rows)
    ours = [index for index, row in enumerate(rows) if row["contender"] == OURS]
    where = f"{machine['device']}, {machine['threads']} threads"
    sections = [
        section(
            "engines",
            "Beside other engines",
            table(head, cells, "Each engine, interleaved with all others", strong=ours),
            grid(
                ratios(rows, f"{model}, {rows[0]['dtype']}").piece(),
                paragraph(
                    "Time / ours: taken round by round, its median; above 1 is slower than depthfuse. Error: the "
                    "largest of an output against the eager model, relative to its largest value.",
                    kind="note",
                ),
            ),
        ),
        section(
            "operations",
            "Where the time goes",
            paragraph(
                f"At batch {rows[0]['batch']}, as {operations.executor}: {operations.fused_count} fused operations "
                f"that absorbed {operations.absorbed_count} layers, {operations.unfused_count} as they were. They are "
                "timed one after another."
            ),
            by_kind(operations.rows()),
            one_by_one(operations.rows(), "All operations"),
        ),
        section("machine", "Machine and versions", facts({"depthfuse": __version__, **machine})),
    ]
    intro = [paragraph(f"{rows[0]['dtype']} on {where}", kind="lead"), tiles(_fastest(rows))]
    return page("depthfuse bench", model, intro, sections)


def _fastest(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """For each batch size: our latency, beside that of the best of the others."""
    cells = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        mine = [row for row in rows if row["batch"] == batch]
        ours = next(row for row in mine if row["contender"] == OURS)
        others = [row for row in mine if row["contender"] != OURS]
        best = min(others, key=lambda row: row["ratio_to_depthfuse"], default=None)
        beside = (
            "beside nothing else"
            if best is None
            else f"best of the others: {best['contender']}, {best['ratio_to_depthfuse']:.2f}x that time"
        )
        cells.append((f"Batch {batch}", f"{ours['latency_ms']:.3f} ms", beside))
    return cells
