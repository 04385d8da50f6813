"""What the user sees: log lines, and the progress of long loops. Rank 0 only, and nothing when quiet.

On a terminal both go through rich, so that log lines appear above the progress bar. Elsewhere (files, pipes,
schedulers) log lines are plain, and progress is a log line every few seconds.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

# Standard output is left to results; one console for log and progress, so that they do not overwrite each other.
console = Console(stderr=True)
_ROOT = "depthfuse"
_LEVELS = {-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}
_PLAIN_INTERVAL_S = 10.0


class Progress(Protocol):
    """A loop under way."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Report `n` more steps, and values to show beside them, such as loss=0.31."""


def setup(verbosity: int = 0) -> None:
    """Send the package's log to standard error. For programs; a library that uses depthfuse sets up its own.

    Args:
        verbosity: -1 warnings only, 0 what is going on, 1 details.

    Raises:
        ValueError: any other verbosity.
    """
    if verbosity not in _LEVELS:
        raise ValueError(f"verbosity must be -1 (quiet), 0 or 1 (details), not {verbosity}")
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger(_ROOT)
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(_LEVELS[verbosity] if is_main_process() else logging.ERROR)


def is_main_process() -> bool:
    """Whether this is the process of a distributed run that talks to the user (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Progress]:
    """Show the progress of a loop: a bar on a terminal, a log line now and then elsewhere.

    Nothing is shown if the package's log level hides INFO, or on other ranks than 0.

    Args:
        description: what is being done, a few words.
        total: number of steps.
        done: steps that an earlier run has done.
    """
    if not (is_main_process() and logger.isEnabledFor(logging.INFO)):
        yield _Hidden()
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        with RichProgress(*columns, console=console) as bars:
            yield _Bar(bars, description, total, done)
    else:
        plain = _Plain(description, total, done)
        yield plain
        plain.finish()


class _Hidden:
    def advance(self, n: int = 1, **fields: object) -> None:
        pass


class _Bar:
    def __init__(self, bars: RichProgress, description: str, total: int, done: int):
        self._bars = bars
        self._task = bars.add_task(description, total=total, completed=done, shown="")

    def advance(self, n: int = 1, **fields: object) -> None:
        if fields:
            self._bars.update(self._task, shown=_format(fields))
        self._bars.advance(self._task, n)


class _Plain:
    def __init__(self, description: str, total: int, done: int):
        self._description, self._total, self._done = description, total, done
        self._fields: dict[str, object] = {}
        self._started = self._reported_at = time.monotonic()
        self._reported = done

    def advance(self, n: int = 1, **fields: object) -> None:
        self._done += n
        self._fields = fields or self._fields
        if time.monotonic() - self._reported_at >= _PLAIN_INTERVAL_S:
            self._report()

    def finish(self) -> None:
        if self._done != self._reported:
            self._report()

    def _report(self) -> None:
        self._reported, self._reported_at = self._done, time.monotonic()
        elapsed_s = self._reported_at - self._started
        logger.info(
            "%s: %d/%d, %.0f s%s%s",
            self._description,
            self._done,
            self._total,
            elapsed_s,
            ", " if self._fields else "",
            _format(self._fields),
        )


def _format(fields: dict[str, object]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in fields.items()
    )
