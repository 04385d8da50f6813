"""What a subnet costs, additively: the whole model, less what each pruned block saves.

One kind of table for every budget: latency measured on this machine (`latency.py`) or predicted for another
(`prediction.py`), multiply-accumulates, and parameters. The search needs no more than this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from depthfuse.checkpoint import load_json, save_json
from depthfuse.errors import CostError
from depthfuse.spec import KEEP
from depthfuse.untrusted import Positive

# Of the conditions, those that change every number.
_MUST_AGREE = ("device", "threads", "dtype", "batch_size", "input_size", "torch")
_SHAPE = {
    "conditions": dict[str, Any],
    "unit": Literal["ms", "MACs", "parameters"],
    "whole": Positive,
    "saved": dict[str, dict[str, float]],
}


@dataclass(frozen=True)
class CostTable:
    """Costs of one model in one unit.

    conditions: what the numbers hold for (model, device, dtype, batch size, versions).
    whole: of the model with every block kept, accelerated.
    saved: {block path: {candidate: what merging this block in this way saves}}; negative where merging loses.
    """

    conditions: dict[str, Any]
    unit: str  # "ms", "MACs" or "parameters"
    whole: float
    saved: dict[str, dict[str, float]]

    def cost(self, choices: Mapping[str, str]) -> float:
        """Of a subnet, {block path: candidate}."""
        return self.whole - sum(self.saved[path][name] for path, name in choices.items() if name != KEEP)

    def paying(self, path: str) -> list[str]:
        """Candidates of a block that save something, the cheapest first."""
        saved = self.saved[path]
        return sorted((name for name in saved if saved[name] > 0), key=lambda name: -saved[name])

    def lacking(self, options: Mapping[str, list[str]]) -> list[str]:
        """The blocks and candidates of `options` that are not in this table, in words."""
        return [
            f"{path} ({name})"
            for path, names in options.items()
            for name in names
            if name not in self.saved.get(path, {})
        ]

    def check_covers(self, options: Mapping[str, list[str]], where: str | Path) -> None:
        """Raise CostError unless every block and candidate of `options` is in this table."""
        missing = self.lacking(options)
        if missing:
            raise CostError(
                f"the cost table {where} was made for {self.conditions.get('model')!r} and lacks "
                f"{', '.join(missing[:3])}: make one for this model"
            )

    def check_conditions(self, wanted: Mapping[str, Any], where: str | Path) -> None:
        """Raise CostError unless this table was made for the machine and the settings of `wanted`."""
        differing = [
            f"{name} {self.conditions.get(name)!r} there, {wanted.get(name)!r} here"
            for name in _MUST_AGREE
            if self.conditions.get(name) != wanted.get(name)
        ]
        if differing:
            raise CostError(
                f"the cost table {where} was made under other conditions ({'; '.join(differing)}): measure here "
                "(leave --latency.table out), or prune for what it was made for with --latency.foreign-table"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON atomically, with a checksum: a digit that flipped would be a wrong number."""
        save_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Raises CheckpointError for a file that is damaged or holds no cost table of this version."""
        document = load_json(path, _SHAPE)
        return cls(**{name: document[name] for name in _SHAPE})
