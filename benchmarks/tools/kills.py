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
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthfuse.checkpoint import load_json, load_tensors, read_json

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


def run_forked(
    job: Job, folder: Path, kill_at: int | None = None, after: bool = False, ranks: int = 1
) -> Ending:
    """Run `job` in a fork, to its end, or until its write number `kill_at` (from 1), before or `after` that call.

    With several `ranks` as many forks work together, as torchrun starts them; the first one is counted and killed, and
    the others are then killed too, as torchrun does.
    """
    counter = mmap.mmap(-1, 8)
    port = _free_port()
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        status = 1
        try:
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if rank == 0:
                _count_writes(counter, kill_at, after)
            job(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    codes = []
    for pid in children:
        if codes and codes[0] != 0:
            os.kill(pid, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    (writes,) = struct.unpack("q", counter[:8])
    return Ending(codes[0] or max(codes), writes)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


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
            try:
                return call(*args, **kwargs)
            finally:  # a file that need not be there is unlinked, too
                if number == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

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
            found[name] = read_json(path) if path.name == "subnet.json" else _lasting(load_json(path))
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
