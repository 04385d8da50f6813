"""Prove on the GPU at hand what can be proven, the most worth knowing first, in the time there is.

    make gpu-proof                  # 25 minutes; MINUTES=60 make gpu-proof for more
    python -m benchmarks.gpu_proof --rehearse --minutes 5     # the same on a CPU, with tiny nets and shapes

It needs torch, Triton and timm, and nothing else. In order: every kernel against float64 in each dtype; four nets,
plain and merged, float16, batch 1 and 128, against eager (as it is, in channels_last, replayed as a graph) and
torch.compile (max-autotune), interleaved; their operators against eager and the vendor's library; tuning of what falls
short; the nets once more. Each part runs in a process of its own, which may fail or be stopped by its time limit: that
is noted, and the next one runs.

It may be killed at any moment: what was found is on the disk, and a second call goes on. All goes into one folder,
named after the device and the versions, below --out: journal.json, a CSV for each step, tuned.json, and proof.md with
all of it in words. Exit status 1 where something did not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_proof.journal import DONE, Journal
from benchmarks.gpu_proof.tables import write_all
from benchmarks.gpu_proof.work import Task, tasks

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("kernels", "depthfuse", "benchmarks")

Clock = Callable[[], float]


def facts_of(rehearse: bool) -> dict[str, Any]:
    """What every figure is quoted with."""
    from depthfuse.env import collect

    found = collect()
    versions = found["versions"]
    gpu = None if rehearse else found["gpus"][0]
    return {
        "device": f"{found['cpu']['name']} (rehearsed)" if gpu is None else gpu["name"],
        "architecture": found["cpu"]["capability"] if gpu is None else gpu["architecture"],
        **{name: versions[name] or "" for name in ("python", "torch", "triton", "timm", "cuda", "hip")},
        "source": source_digest(),
    }


def source_digest() -> str:
    """Of all sources: a figure counts for the code that gave it."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).resolve().rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def folder_of(out: Path, facts: dict[str, Any]) -> Path:
    parts = (facts["device"], f"torch{facts['torch']}", f"triton{facts['triton']}", facts["source"])
    return out / "_".join(re.sub(r"[^\w.+-]+", "-", part).strip("-") for part in parts)


def command_of(task: Task, rehearse: bool) -> list[str]:
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu_proof.work",
        json.dumps([[task.step, *task.args], rehearse]),
    ]


def run(
    journal: Journal,
    todo: list[Task],
    minutes: float | None,
    command: Callable[[Task], list[str]],
    clock: Clock = time.monotonic,
) -> None:
    """Do what is not done yet, as far as time allows; the journal and the tables grow as results come.

    Args:
        command: that does a task and prints its rows. clock: seconds.
    """
    end = None if minutes is None else clock() + 60 * minutes
    for task in todo:
        current: Task | None = task
        while current is not None and current.name not in journal.ended:
            left = float("inf") if end is None else end - clock()
            if left < current.least_s:
                print(f"{current.name}: not begun, {max(left, 0):.0f} s are left", flush=True)
                break
            print(f"{current.name} ...", flush=True)
            how = _do(journal, command(current), min(current.limit_s, left))
            if how != DONE and end is not None and clock() >= end:
                print(f"{current.name}: stopped, time is over", flush=True)
                break  # a later call has the time for it
            journal.end(current.name, how)
            write_all(journal)
            print(f"{current.name}: {how}", flush=True)
            current = None if how == DONE else current.fallback


def _do(journal: Journal, command: list[str], limit_s: float) -> str:
    """Run a task's process and take its rows as they come; how it ended."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines, journal.of("operators")), daemon=True).start()
        end = time.monotonic() + limit_s
        try:
            while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                step, key, row = json.loads(line)
                journal.add(step, key, row)
                write_all(journal)
            status = process.wait()
        except queue.Empty:
            return f"stopped after {limit_s:.0f} s"
        finally:
            process.kill()
            process.wait()
        if status == 0:
            return DONE
        errors.seek(0)
        last = [text for text in errors.read().splitlines() if text.strip()]
        return (last[-1] if last else f"the process ended with {status}")[:300]


def _read(process: subprocess.Popen, lines: queue.Queue, known: list) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(known))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended, and its status says why
    for line in process.stdout:
        if line.startswith("["):
            lines.put(line)
    lines.put(None)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_proof",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, help="time there is; without it, as long as it takes")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-proof", help="where the folder goes")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny nets and shapes")
    parser.add_argument("--again", action="store_true", help="also what failed before")
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error(
            "this torch can use no GPU; --rehearse runs the same on a CPU, with tiny nets and shapes"
        )
    facts = facts_of(options.rehearse)
    journal = Journal.open(folder_of(options.out, facts), facts)
    if options.again:
        journal.ended = {task: how for task, how in journal.ended.items() if how == DONE}
    run(
        journal,
        list(tasks(options.rehearse)),
        options.minutes,
        lambda task: command_of(task, options.rehearse),
    )
    write_all(journal)
    print(f"written: {journal.folder / 'proof.md'}")
    return 0 if all(how == DONE for how in journal.ended.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
