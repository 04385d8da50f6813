"""Kill a job at its n-th write, start it again, and compare what it leaves with a job that nobody disturbed.

A job runs in a fork of a process that has imported everything, so that a kill costs what the job costs and no more. In
the fork the calls by which anything reaches the disk are counted, and at the n-th one the process kills itself, before
the call or right after it: no signal that comes from outside hits every such moment.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthfuse.checkpoint import load_json, load_tensors

Job = Callable[[Path], None]  # works in a folder, and goes on with what it finds there

# By these all files of ours come into being, take their place, and go.
_WRITES = ("fsync", "replace", "unlink", "truncate")
# Of what a run measures, no two runs agree: these numbers are left out of the comparison.
_MEASURED = frozenset(
    ["latency_ms", "latency_quartiles_ms", "speedup", "seconds", "budget", "reached", "met", "out", "check"]
)
_PICTURES = (".png", ".md", ".csv", ".log")


@dataclass(frozen=True)
class Ending:
    """How a job in a fork ended. status: its exit code, or minus the signal. writes: how many it began."""

    status: int
    writes: int


def run_forked(job: Job, folder: Path, kill_at: int | None = None, after: bool = False) -> Ending:
    """Run `job` in a fork, to its end, or until its write number `kill_at` (from 1), before or `after` that call."""
    counter = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _count_writes(counter, kill_at, after)
            job(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, code = os.waitpid(pid, 0)
    (writes,) = struct.unpack("q", counter[:8])
    return Ending(os.waitstatus_to_exitcode(code), writes)


def _count_writes(counter: mmap.mmap, kill_at: int | None, after: bool) -> None:
    """Replace the calls of `os` in this process, for good."""
    writes = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal writes
            writes += 1
            number = writes
            counter[:8] = struct.pack("q", writes)
            if number == kill_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    for name in _WRITES:
        setattr(os, name, counted(getattr(os, name)))


def moments(writes: int, kills: int) -> Iterator[tuple[int, bool]]:
    """`kills` moments, spread evenly over a job of so many writes: (number of the write, after it)."""
    every = [(number, after) for number in range(1, writes + 1) for after in (False, True)]
    for index in range(kills):
        yield every[math.floor(index * len(every) / kills) % len(every)]


def contents(folder: Path) -> dict[str, Any]:
    """What a job left, by file: tensors as bytes, documents as values; without what is measured, plots and reports."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.suffix in _PICTURES or path.name.startswith("seconds_"):
            continue
        if path.suffix == ".safetensors":
            tensors, metadata = load_tensors(path)
            found[name] = {
                key: (str(t.dtype), list(t.shape), t.numpy().tobytes()) for key, t in tensors.items()
            }
            found[name]["metadata"] = json.dumps(metadata, sort_keys=True)
        elif path.name == "config.yaml":
            found[name] = [line for line in path.read_text().splitlines() if str(folder) not in line]
        elif path.suffix == ".json":
            found[name] = _lasting(load_json(path))
        else:
            found[name] = path.read_bytes()
    return found


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in _MEASURED}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The files in which two `contents` differ, or that only one has."""
    return [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]
