"""`depthfuse pick`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from depthfuse import log
from depthfuse.cli.command import Invocation


@dataclass
class PickArguments:
    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a run whose search is done: what `depthfuse search` leaves, with front.csv and plots/front.png."""
    speedup: float | None = None
    """The best net that is at least so many times as fast as the accelerated baseline."""
    points: float | None = None
    """The fastest net that loses at most so many percentage points against the unpruned net, on the held-out images and
    before fine-tuning, which gives some of them back."""
    blocks: int | None = None
    """The best net of exactly so many pruned blocks."""
    out: Path | None = None
    """Where it goes; default: a folder in RUN, such as RUN/pick-speedup-1.3."""
    allow: tuple[str, ...] = ()
    """Your own code that the run uses, as package.module:NAME: it is imported only where you name it."""


def pick(invocation: Invocation) -> int | None:
    given = invocation.settings(PickArguments)
    from depthfuse.cli.prune import close
    from depthfuse.runs.pick import pick

    run = pick(given.run, speedup=given.speedup, points=given.points, blocks=given.blocks, out=given.out)
    return close([run.dir]) if log.is_main_process() else None
