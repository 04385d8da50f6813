"""Log lines and progress for people: rich on a terminal, plain lines elsewhere, rank 0 only."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0  # how often progress is logged off a terminal

logger = logging.getLogger("depthfuse")
_console = Console(stderr=True)


def setup(level: int = logging.INFO) -> None:
    """Show depthfuse's log on stderr; other ranks than 0 show warnings only. Call it once, from a program's main."""
    if int(os.environ.get("RANK", "0")) != 0:
        level = logging.WARNING
    handler: logging.Handler
    if _console.is_terminal:
        handler = RichHandler(console=_console, show_path=False, log_time_format="%X")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


class Bar:
    """What `progress` yields."""

    def __init__(self, label: str, total: int, start: int, shown: Progress | None):
        self.label, self.total, self.done, self.shown = label, total, start, shown
        self.task = None if shown is None else shown.add_task(label, total=total, completed=start, fields="")
        self.last = time.monotonic()

    def advance(self, n: int = 1, **fields: float) -> None:
        """Count n more steps done; fields are shown beside them (loss=0.3)."""
        self.done += n
        if self.shown is not None and self.task is not None:
            self.shown.update(self.task, advance=n, fields=_text(fields))
        elif time.monotonic() - self.last > PLAIN_SECONDS:
            self.last = time.monotonic()
            logger.info("%s: %d of %d  %s", self.label, self.done, self.total, _text(fields))


def _text(fields: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in fields.items())


@contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Bar]:
    """A bar on a terminal, a log line every 15 seconds elsewhere; nothing where depthfuse's log is off."""
    if not (_console.is_terminal and logger.isEnabledFor(logging.INFO) and logger.handlers):
        yield Bar(label, total, start, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
    )
    with Progress(*columns, console=_console) as shown:
        yield Bar(label, total, start, shown)
