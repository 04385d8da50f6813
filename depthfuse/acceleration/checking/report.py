"""What an accelerated model is made of and what was found when it was made, as a value and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from depthfuse.acceleration.planning.plan import Entry


@dataclass(frozen=True)
class Report:
    """All operations of a plan, in order, and what was measured when it was made.

    executor: what runs the plan as a whole. whole: what runs all operations in the place of the implementations that
    are bound to them, as an engine does, or the model itself; None where those run. max_relative_error:
    max |plan - model| / max |model| on the example input, or None if that was not verified. engines: the time of each
    that was tried for the whole plan over that of what was chosen. latency_ms: of the plan ("accelerated") and of the
    model in each memory layout, on the example input; empty where they were not compared. ratios: of those over the
    plan's, round by round, because a machine's speed drifts: the quotient of two medians can be another.
    """

    model: str
    dtype: str
    device: str
    entries: tuple[Entry, ...]
    executor: str
    max_relative_error: float | None
    whole: str | None = None
    engines: Mapping[str, float] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)

    @property
    def fused_count(self) -> int:
        """How many operations of the plan are fused modules."""
        return sum(entry.fused for entry in self.entries)

    @property
    def absorbed_count(self) -> int:
        """How many layers of the model were absorbed into those, besides the products themselves."""
        return sum(len(entry.absorbed) for entry in self.entries)

    @property
    def unfused_count(self) -> int:
        """How many operations run as they were."""
        return len(self.entries) - self.fused_count

    @property
    def worst(self) -> Entry | None:
        """The operation with the largest error against float64, or None where errors were not asked for."""
        known = [entry for entry in self.entries if entry.error is not None]
        return max(known, key=lambda entry: entry.error or 0.0, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """The entries as a table of plain values; columns that nothing was measured for are left out.

        implementation: what runs an operation on the example. op by op: where that is an engine, or the model itself,
        what would run it without, as an engine's plan for other shapes. latency_ms: in the native engine where that is
        what runs, else op by op.
        """
        rows = []
        for entry in self.entries:
            row: dict[str, Any] = {
                "path": entry.path,
                "op": entry.kind,
                "implementation": self.whole or entry.implementation,
            }
            if self.whole is not None:
                row["op by op"] = entry.implementation
            if entry.cost is not None:
                row |= {
                    "latency_ms": entry.cost.latency_ms,
                    "before_ms": entry.cost.before_ms,
                    "MACs": entry.cost.macs,
                    "bytes": entry.cost.bytes_moved,
                    "roofline_ms": entry.cost.roofline_ms,
                    "roofline_%": entry.cost.roofline_percent,
                }
            if any(e.error is not None for e in self.entries):
                row["error"] = entry.error
            rows.append(row | {"epilogue": entry.epilogue, "absorbed": ", ".join(entry.absorbed)})
        empty = [key for key in (rows[0] if rows else {}) if all(row[key] is None for row in rows)]
        return [{key: value for key, value in row.items() if key not in empty} for row in rows]

    def __str__(self) -> str:
        rows = self.rows()
        lines = _table(rows) if rows else []
        error = "not verified" if self.max_relative_error is None else f"{self.max_relative_error:.1e}"
        lines.append(
            f"{self.model}, {self.dtype} on {self.device}, {self.executor}: {self.fused_count} fused operations "
            f"that absorbed {self.absorbed_count} layers, {self.unfused_count} as they were; "
            f"largest relative error {error}"
        )
        if self.worst is not None:
            lines.append(f"worst against float64: {self.worst.path}, relative error {self.worst.error:.1e}")
        if self.engines:
            others = sorted(self.engines.items(), key=lambda named: named[1])
            times = ", ".join(f"{name} {ratio:.2f}" for name, ratio in others)
            lines.append(f"engines by their time over that of the one chosen: {times}")
        if self.latency_ms:
            ratios = {name: f" ({ratio:.2f}x)" for name, ratio in self.ratios.items()}
            lines.append(
                ", ".join(f"{name} {ms:.3f} ms{ratios.get(name, '')}" for name, ms in self.latency_ms.items())
            )
        return "\n".join(line.rstrip() for line in lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [list(rows[0]), *([_text(key, value) for key, value in row.items()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    widths[-1] = 0  # the last one may be long: nothing is aligned behind it
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _text(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.endswith("_ms"):
        return f"{value:.3f}"
    if key == "roofline_%":
        return f"{value:.0f}"
    if key == "error":
        return f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
