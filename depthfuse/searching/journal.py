"""What has been scored: one line a subnet, appended as scores come, so that a killed search goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from depthfuse.checkpoint import read_bounded
from depthfuse.errors import CheckpointError
from depthfuse.searching.intervals import Paired
from depthfuse.searching.scoring import SubnetScore
from depthfuse.searching.space import Choices
from depthfuse.spec import key_of
from depthfuse.untrusted import MALFORMED, conform, parse_json

_SHAPE = {
    "choices": dict[str, str],
    "top1": float,
    "loss": float | Literal["nan", "inf", "-inf"],  # of a subnet whose outputs overflow
    "divergence?": float | Literal["nan", "inf", "-inf"],
    "images?": int,  # and the next two: beside the unpruned net, see `Paired`
    "lost?": int,
    "gained?": int,
    "sha256": str,
}
# 8,000 subnets of 100 blocks.
_MAX_BYTES, _MAX_LINE_BYTES = 16 * 2**20, 2**16


class Journal:
    """Scores by subnet, appended to a file as they come. A line cut short by a crash, the last one, is dropped.

    Raises CheckpointError, naming the line, where any other line is damaged or of another version.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: dict[str, tuple[Choices, SubnetScore]] = {}
        self.pairs: dict[str, Paired] = {}
        if path is not None and path.exists():
            data = read_bounded(path, _MAX_BYTES)
            whole = data[: data.rfind(b"\n") + 1]
            for number, line in enumerate(whole.split(b"\n")[:-1], 1):
                try:
                    choices, score, pair = _parse(line)
                except MALFORMED as error:
                    raise CheckpointError(
                        f"{path}, line {number}, is damaged or of an earlier version ({error}): delete that line, or "
                        "the file, and run again; what is lost is scored again"
                    ) from error
                self._keep(choices, score, pair)
            if whole != data:
                os.truncate(path, len(whole))

    def get(self, choices: Choices) -> SubnetScore | None:
        row = self.rows.get(key_of(choices))
        return None if row is None else row[1]

    def pair(self, choices: Choices) -> Paired | None:
        """A subnet beside the unpruned net, where that is known."""
        return self.pairs.get(key_of(choices))

    def _keep(self, choices: Choices, score: SubnetScore, pair: Paired | None) -> None:
        self.rows[key_of(choices)] = choices, score
        if pair is not None:
            self.pairs[key_of(choices)] = pair

    def add(self, choices: Choices, score: SubnetScore, pair: Paired | None = None) -> None:
        self._keep(choices, score, pair)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(_line(choices, score, pair) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _line(choices: Choices, score: SubnetScore, pair: Paired | None) -> str:
    row = {"choices": dict(choices), "top1": score.top1, "loss": _plain(score.loss)}
    if score.divergence is not None:
        row["divergence"] = _plain(score.divergence)
    row |= pair._asdict() if pair else {}
    return json.dumps(row | {"sha256": _digest(row)})


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _parse(line: bytes) -> tuple[Choices, SubnetScore, Paired | None]:
    row: Any = parse_json(line, at_most=_MAX_LINE_BYTES)
    conform(row, _SHAPE, "the line")
    digest = row.pop("sha256")
    if digest != _digest(row):
        raise ValueError("its checksum does not match its contents")
    pair = Paired(row["images"], row["lost"], row["gained"]) if "images" in row else None
    divergence = float(row["divergence"]) if "divergence" in row else None
    return row["choices"], SubnetScore(row["top1"], float(row["loss"]), divergence), pair


def _digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]
