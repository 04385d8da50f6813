"""The latency table of a run: given, found where an earlier start of it left off, or measured."""

from __future__ import annotations

from pathlib import Path

from depthfuse.config import LatencyConfig
from depthfuse.costs.latency import conditions_of, make_latencies
from depthfuse.costs.table import CostTable
from depthfuse.errors import CostError
from depthfuse.merging.supernet import Supernet


def make_table(path: Path, supernet: Supernet, size: tuple[int, int, int], settings: LatencyConfig) -> None:
    """Let `path` hold a latency table of all candidates. size: of one image, (C, H, W).

    Raises CostError for a table in `settings` that is of other candidates, conditions or units, or makes no sense.
    """
    if path.exists():  # what the run has been planned with stays, whatever the machine does today
        table = CostTable.load(path)
        if not table.lacking(supernet.options()) and not _was_cut_short(table, supernet, size, settings):
            return
    if settings.table is None:  # also goes on with a table that was cut short
        make_latencies(supernet, size, settings, cache=path)
        return
    table = CostTable.load(settings.table)
    if table.unit != "ms":
        raise CostError(f"the cost table {settings.table} counts {table.unit}: give one in ms")
    table.check_covers(supernet.options(), settings.table)
    table.check_plausible(settings.table)
    if not settings.foreign_table:
        table.check_conditions(conditions_of(supernet, size, settings), settings.table)
    table.save(path)


def _was_cut_short(
    table: CostTable, supernet: Supernet, size: tuple[int, int, int], settings: LatencyConfig
) -> bool:
    """Whether the measurement of a table ended before its last step, and can go on here."""
    own = settings.table is None and table.conditions == conditions_of(supernet, size, settings)
    return own and table.floor is None
