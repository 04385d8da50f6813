"""What an accelerated model is made of: one entry an operation, with its path in the original model."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Entry:
    """One operation of the plan.

    path: module path in the original model. kind: class or function. implementation: what runs it ("eager" if
    it runs as it was). epilogue: what is fused behind it. absorbed: paths of the layers that it also stands
    for. name: path of a fused module in the plan.
    """

    path: str
    kind: str
    implementation: str
    epilogue: str
    absorbed: tuple[str, ...]
    fused: bool
    name: str = ""

    def inside(self, prefix: str) -> Entry:
        """The same entry with its paths below `prefix`."""
        return replace(
            self,
            path=f"{prefix}.{self.path}",
            name=f"{prefix}.{self.name}" if self.name else "",
            absorbed=tuple(f"{prefix}.{path}" for path in self.absorbed),
        )


@dataclass(frozen=True)
class Report:
    """All operations of a plan, in order, and the largest error against the model it was made from.

    executor: what runs the plan as a whole.
    max_relative_error: max |plan - model| / max |model| on the example input, or None if that was not
    verified.
    """

    model: str
    dtype: str
    device: str
    entries: tuple[Entry, ...]
    executor: str
    max_relative_error: float | None

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

    def __str__(self) -> str:
        rows = [("path", "op", "implementation", "epilogue", "absorbed")]
        rows += [(e.path, e.kind, e.implementation, e.epilogue, ", ".join(e.absorbed)) for e in self.entries]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + "  " + row[4]
            for row in rows
        ]
        error = "not verified" if self.max_relative_error is None else f"{self.max_relative_error:.1e}"
        lines.append(
            f"{self.model}, {self.dtype} on {self.device}, {self.executor}: {self.fused_count} fused operations "
            f"that absorbed {self.absorbed_count} layers, {self.unfused_count} as they were; "
            f"largest relative error {error}"
        )
        return "\n".join(line.rstrip() for line in lines)
