"""What the operations of an accelerated net cost, and the engines that were tried for all of it, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from depthfuse.reporting.markup import Piece, bar, folded, table

# Of a row of `Report.rows()`: its title here, and how its value is written.
_COLUMNS = {
    "path": ("layer", "{}"),
    "op": ("operation", "{}"),
    "implementation": ("runs on", "{}"),
    "op by op": ("op by op on", "{}"),
    "latency_ms": ("ms", "{:.3f}"),
    "before_ms": ("before, ms", "{:.3f}"),
    "MACs": ("MACs", "{:,}"),
    "bytes": ("bytes", "{:,}"),
    "roofline_ms": ("roofline, ms", "{:.3f}"),
    "roofline_%": ("of roofline, %", "{:.0f}"),
    "error": ("error", "{:.1e}"),
    "epilogue": ("epilogue", "{}"),
    "absorbed": ("absorbed layers", "{}"),
}
NATIVE = "native engine"  # as `depthfuse.acceleration` calls what tells the time of each of its operations


def by_kind(rows: Sequence[Mapping[str, Any]]) -> Element | None:
    """Latency summed over operations of one kind on one implementation, the longest first; None where none is known.

    rows: as of `depthfuse.acceleration.Report.rows`.
    """
    sums: dict[tuple[str, str], tuple[int, float, float | None]] = {}
    for row in rows:
        if row.get("latency_ms") is None:
            continue
        runs = row["implementation"]
        key = str(row["op"]), str(runs if runs == NATIVE else row.get("op by op") or runs)
        count, latency_ms, before_ms = sums.get(key, (0, 0.0, 0.0))
        own_before = row.get("before_ms")
        before_ms = None if own_before is None or before_ms is None else before_ms + own_before
        sums[key] = count + 1, latency_ms + row["latency_ms"], before_ms
    whole = sum(latency_ms for _, latency_ms, _ in sums.values())
    if not whole:
        return None
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    cells: list[list[Piece]] = [
        [
            op,
            implementation,
            str(count),
            f"{latency_ms:.3f}",
            "" if before_ms is None else f"{before_ms:.3f}",
            f"{100 * latency_ms / whole:.0f} %",
            bar(latency_ms / whole),
        ]
        for (op, implementation), (count, latency_ms, before_ms) in ranked
    ]
    head = ["operation", "runs on", "count", "ms", "before, ms", "share", ""]
    return table(head, cells, f"Latency by kind of operation, {whole:.3f} ms one after another")


def one_by_one(rows: Sequence[Mapping[str, Any]], title: str) -> Element | None:
    """All operations, to be opened."""
    if not rows:
        return None
    shown = [name for name in _COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    cells = [
        ["" if row.get(name) is None else _COLUMNS[name][1].format(row[name]) for name in shown]
        for row in rows
    ]
    return folded(f"{title} ({len(rows)})", table([_COLUMNS[name][0] for name in shown], cells, title))


def of_engines(engines: Mapping[str, float]) -> Element | None:
    """The engines that were tried for a whole net, by their time over that of the one that was chosen."""
    ranked = sorted(engines.items(), key=lambda item: item[1])
    most = max(engines.values(), default=1.0)
    cells: list[list[Piece]] = [[name, f"{ratio:.2f}x", bar(ratio / most)] for name, ratio in ranked]
    return table(
        ["engine", "time", ""], cells, "Engines for the whole net, by time over that of the one chosen"
    )
