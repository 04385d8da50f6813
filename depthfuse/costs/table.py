"""What a subnet costs, additively: the whole model, less what each pruned block saves.

One kind of table for every budget: latency measured on this machine (`latency.py`) or predicted for another
(`prediction.py`), multiply-accumulates, and parameters. The search needs no more than this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from depthfuse.checkpoint import load_json, save_json
from depthfuse.errors import CostError
from depthfuse.spec import KEEP
from depthfuse.untrusted import Positive

# Of the conditions, those that change every number.
_MUST_AGREE = ("device", "threads", "dtype", "batch_size", "input_size", "torch")
# A saving is noise where its standard error is above this share of it, and of what a block costs on average.
_NOISE_OF_SAVING, _NOISE_OF_BLOCK = 0.25, 0.1
_SHAPE = {
    "conditions": dict[str, Any],
    "unit": Literal["ms", "MACs", "parameters"],
    "whole": Positive,
    "saved": dict[str, dict[str, float]],
    "spread": dict[str, dict[str, float]],
    "floor": float | None,
}


@dataclass(frozen=True)
class CostTable:
    """Costs of one model in one unit.

    conditions: what the numbers hold for (model, device, dtype, batch size, versions).
    whole: of the model with every block kept, accelerated.
    saved: {block path: {candidate: what merging this block in this way saves}}; negative where merging loses.
    floor: of the subnet of all best candidates, as a whole: the least that a budget can ask for. None where that has
        not been measured (yet).
    spread: {block path: {candidate: standard error of `saved`}}, where it was measured.
    """

    conditions: dict[str, Any]
    unit: str  # "ms", "MACs" or "parameters"
    whole: float
    saved: dict[str, dict[str, float]]
    floor: float | None = None
    spread: dict[str, dict[str, float]] = field(default_factory=dict)

    def cost(self, choices: Mapping[str, str]) -> float:
        """Of a subnet, {block path: candidate}."""
        return self.whole - sum(self.saved[path][name] for path, name in choices.items() if name != KEEP)

    def paying(self, path: str) -> list[str]:
        """Candidates of a block that save something, the cheapest first."""
        saved = self.saved[path]
        return sorted((name for name in saved if saved[name] > 0), key=lambda name: -saved[name])

    def best(self) -> dict[str, str]:
        """The subnet of least cost: each block's cheapest candidate that saves something."""
        names = {path: self.paying(path) for path in self.saved}
        return {path: paying[0] for path, paying in names.items() if paying}

    def is_noise(self, saved: float, spread: float) -> bool:
        """Whether a standard error is too large: beside the saving, and beside what a block costs on average."""
        return spread > max(_NOISE_OF_SAVING * abs(saved), _NOISE_OF_BLOCK * self.whole / len(self.saved))

    def noisy(self) -> list[str]:
        """The blocks and candidates whose saving is noise, in words."""
        return [
            f"{path} ({name})"
            for path, names in self.spread.items()
            for name, spread in names.items()
            if self.is_noise(self.saved[path][name], spread)
        ]

    def saving_in_words(self, path: str, name: str) -> str:
        """What a candidate saves, with its standard error and a remark where it is noise."""
        saved, spread = self.saved[path][name], self.spread.get(path, {}).get(name)
        if spread is None:
            return f"{saved:.4f}"
        return f"{saved:.4f} ± {spread:.4f}{' (noisy)' if self.is_noise(saved, spread) else ''}"

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

    def check_plausible(self, where: str | Path) -> None:
        """Raise CostError where subnets would cost nothing or less, or a number is none."""
        numbers = [
            self.whole,
            self.floor or 0.0,
            *(saved for names in self.saved.values() for saved in names.values()),
        ]
        if all(map(math.isfinite, numbers)) and self.cost(self.best()) > 0:
            return
        raise CostError(
            f"the cost table {where} cannot be true: of {self.whole:.4g} {self.unit} for the whole model its best "
            f"savings leave {self.cost(self.best()):.4g}. Was it measured beside other work? Measure it again"
        )

    def differing(self, wanted: Mapping[str, Any]) -> list[str]:
        """What of the machine and the settings of `wanted` this table was not made for, in words."""
        return [
            f"{name} {self.conditions.get(name)!r} there, {wanted.get(name)!r} here"
            for name in _MUST_AGREE
            if self.conditions.get(name) != wanted.get(name)
        ]

    def check_conditions(self, wanted: Mapping[str, Any], where: str | Path) -> None:
        """Raise CostError unless this table was made for the machine and the settings of `wanted`."""
        differing = self.differing(wanted)
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
