"""Two real processes that work together, for tests. Each has one thread, and all have a time limit: a run that hangs is
a test that fails."""

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

LIMIT_S = 120


class Processes:
    """Processes under way; none of them outlives the block."""

    def __init__(self, commands: Sequence[Sequence[str | Path]], environments: Sequence[dict[str, str]]):
        self._folder = tempfile.TemporaryDirectory()
        self._logs = [Path(self._folder.name, str(number)) for number in range(len(commands))]
        self._processes = []
        for command, own, log in zip(commands, environments, self._logs, strict=True):
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | own
            with log.open("w") as file:
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            self._processes.append(process)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()  # torchrun then ends its workers
        for process in self._processes:
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
        self._folder.cleanup()

    def said(self) -> list[str]:
        """What each has written so far."""
        return [log.read_text() for log in self._logs]

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for what these processes bring about."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert all(process.poll() is None for process in self._processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)

    def exit_codes(self) -> list[int]:
        """Wait for the end of all."""
        deadline = time.monotonic() + LIMIT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {LIMIT_S} s: {self.said()}") from None
        return [process.returncode for process in self._processes]


def torchrun(*arguments: str | Path) -> Processes:
    """`python ARGUMENTS` as two processes under torchrun, which ends all of them when one fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return Processes([[*launcher, *arguments]], [{}])


def pair(*arguments: str | Path) -> Processes:
    """`python ARGUMENTS` as two processes with nobody over them: each has to end by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    return Processes(
        [[sys.executable, *arguments]] * 2, [shared | {"RANK": r, "LOCAL_RANK": r} for r in "01"]
    )


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder filled by `make`, for all tests and for all workers of pytest-xdist: the first makes it, others wait."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()  # fails where an earlier try has failed
            make(folder)
            done.touch()
    return folder
