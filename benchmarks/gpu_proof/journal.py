"""What a proof has found so far: one file, whole at any moment, from which all tables are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depthfuse.checkpoint import load_json, save_json

NAME = "journal.json"
DONE = "done"


@dataclass
class Journal:
    """Rows and how tasks ended.

    folder: where it lies. facts: device and versions. rows: {step: {key: row}}, in the order in which they came; a task
    that is done again puts its rows in the place of those before. ended: {task: DONE, or why it failed}.
    """

    folder: Path
    facts: dict[str, Any]
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, facts: dict[str, Any]) -> Journal:
        """The one in `folder`, or a new one. Raises CheckpointError for a file that is damaged."""
        path = folder / NAME
        if not path.exists():
            return cls(folder, facts)
        document = load_json(path)
        return cls(folder, facts, document["rows"], document["ended"])

    def add(self, step: str, key: str, row: dict[str, Any]) -> None:
        self.rows.setdefault(step, {})[key] = row
        self._save()

    def end(self, task: str, how: str) -> None:
        self.ended[task] = how
        self._save()

    def of(self, step: str) -> list[dict[str, Any]]:
        """The rows of a step."""
        return list(self.rows.get(step, {}).values())

    def _save(self) -> None:
        save_json(self.folder / NAME, {"facts": self.facts, "rows": self.rows, "ended": self.ended})
