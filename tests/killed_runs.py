"""A command that is killed when a file appears, and what its run and another have to have in common."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from depthfuse.checkpoint import load_tensors
from depthfuse.config import PruneConfig, to_yaml


def environment() -> dict[str, str]:
    """With as many threads as here: other numbers of them sum up in other orders."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def merge_command(config: PruneConfig, finished: Path, folder: Path) -> tuple[list[Any], Path]:
    """(`depthfuse merge` of a config into a folder of its own, that folder); by the latencies of a finished run."""
    out, file = folder / "run", folder / "config.yaml"
    latency = dataclasses.replace(config.latency, table=finished / "latency.json")
    file.write_text(to_yaml(dataclasses.replace(config, latency=latency)))
    return [sys.executable, "-m", "depthfuse.cli", "merge", "--config", file, "--out", out], out


def kill_when_there(command: Sequence[Any], file: Path, limit_s: float = 300) -> None:
    """Start a command and send it SIGKILL as soon as `file` is there; fails where it ends before, or takes longer."""
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + limit_s
    while not file.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def run_again(command: Sequence[Any]) -> str:
    """Run a command to its end, which must be a good one; what it told."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stderr


def assert_same_weights(folder: Path, other: Path, names: Iterable[str]) -> None:
    """NAME.safetensors of two runs hold the same bits."""
    for name in names:
        got, wanted = (load_tensors(run / f"{name}.safetensors")[0] for run in (folder, other))
        assert set(got) == set(wanted) and all(torch.equal(got[key], wanted[key]) for key in wanted), name
