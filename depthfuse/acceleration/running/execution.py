"""The choice of how a plan runs as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

EAGER = ("eager", "eager channels_last")


@dataclass(frozen=True)
class Execution:
    """The choice and what it rests on.

    chunk: how many images run at a time, None for all. compiled: whether oneDNN Graph runs the plan for the example's
    shapes. eager: "eager" or "eager channels_last" where the model itself runs. graphs: whether launches are replayed
    as graphs (on a GPU). latency_ms: of the plan and of the model in each layout, on the example input; empty where
    nothing was compared. ratios: each layout's time over the plan's, medians of interleaved rounds.
    """

    chunk: int | None = None
    compiled: bool = False
    eager: str | None = None
    graphs: bool = False
    latency_ms: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON for the cache."""
        return dict(vars(self))

    @classmethod
    def from_document(cls, document: dict[str, Any] | None) -> Execution | None:
        """From the cache, or None where that holds anything else."""
        if document is None:
            return None
        try:
            made = cls(**document)
        except TypeError:
            return None
        sane = (made.chunk is None or isinstance(made.chunk, int)) and made.eager in (None, *EAGER)
        return made if sane and isinstance(made.latency_ms, dict) and isinstance(made.ratios, dict) else None

    def in_words(self, inputs: tuple[Tensor, ...]) -> str:
        """What runs, for the report."""
        if self.eager is not None:
            return (
                f"{self.eager}: the model itself, whose time was {self.ratios[self.eager]:.2f} of the plan's"
            )
        text = "one graph for each input shape" if self.graphs else "op by op"
        if self.compiled:
            part = inputs if self.chunk is None else tuple(x[: self.chunk] for x in inputs)
            shapes = " and ".join(str(list(x.shape)) for x in part)
            text = f"oneDNN Graph for {shapes}, op by op for other shapes"
        return text if self.chunk is None else f"{text}, {self.chunk} images at a time"
