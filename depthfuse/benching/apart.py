"""Each contender in a process of its own, for fair timing on a CPU.

In one process they disturb each other: OpenVINO ties its caller to a core, OpenMP's threads spin for milliseconds after
their work, and each engine keeps threads of its own. The processes run in turn: only one computes at a time.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from depthfuse.measuring.accuracy import relative_error
from depthfuse.measuring.timing import Timing, time_interleaved

Make = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
_SETTLE_MS = 100.0  # other processes have been through the caches, and their threads spin after their work
_END_S = 10.0


class Failed(Exception):
    """What a contender's process raised, in its words."""


class Contender:
    """A process that has made its engine and waits to be asked.

    Args:
        make: from a model and an example to what runs it; a function that can be pickled.

    Raises Failed.
    """

    def __init__(self, make: Make, model: nn.Module, x: Tensor) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(target=_serve, args=(theirs, make, model, x, threads), daemon=True)
        try:
            self._process.start()
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise Failed(f"it cannot be sent to a process of its own: {error}") from error
        theirs.close()
        self.error: float = self._answer()

    def round_ms(self, least_ms: float) -> float:
        """The mean time of a call, over at least so many ms, after some calls that are not timed."""
        self._pipe.send(("round", least_ms))
        return self._answer()

    def each_ms(self, least_ms: float) -> list[float]:
        """The time of every single call for so many ms."""
        self._pipe.send(("each", least_ms))
        return self._answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self):
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join(_END_S)
            raise Failed(f"its process ended with code {self._process.exitcode}") from None
        if kind == "failed":
            raise Failed(value)
        return value


def _serve(pipe: Connection, make: Make, model: nn.Module, x: Tensor, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            run = make(model, x)
            pipe.send(("error", relative_error(run(x), model(x))))
            while True:
                kind, least_ms = pipe.recv()
                pipe.send((kind, _timed(run, x, kind, least_ms)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # nobody asks any more
    except Exception as error:  # whatever another project raises
        pipe.send(("failed", (str(error) or repr(error)).splitlines()[0]))


def _timed(run: Callable[[Tensor], Tensor], x: Tensor, kind: str, least_ms: float) -> float | list[float]:
    call = {"it": lambda: run(x)}
    if kind == "round":
        timing = time_interleaved(call, 1, least_ms, warmup=1, device=x.device, settle_ms=_SETTLE_MS)
        return timing["it"].median_ms
    times: list[float] = []
    with torch.inference_mode():
        while sum(times) < least_ms or len(times) < 3:
            start = time.perf_counter()
            run(x)
            times.append((time.perf_counter() - start) * 1e3)
    return times


# Each says a line when it is at work, and works until its parent, whose number it is given, has ended, which may be
# killed.
_BUSY = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(1000000):
        pass
"""
_CONVOLUTIONS = """
import os, sys, torch
torch.set_num_threads(2)
x, weight = torch.randn(1, 64, 56, 56), torch.randn(64, 64, 3, 3)
with torch.inference_mode():
    torch.conv2d(x, weight, padding=1)
    print(flush=True)
    while os.getppid() == int(sys.argv[1]):
        torch.conv2d(x, weight, padding=1)
"""
BUSY, CONVOLUTIONS = "busy", "convolutions"
_NEIGHBOURS = {BUSY: _BUSY, CONVOLUTIONS: _CONVOLUTIONS}


@contextmanager
def beside(neighbour: str, processes: int = 1) -> Iterator[None]:
    """So many processes that compute without end beside us: BUSY, on one thread, or CONVOLUTIONS, PyTorch's on two
    threads of OpenMP, as another program that runs a network.
    """
    command = [sys.executable, "-c", _NEIGHBOURS[neighbour], str(os.getpid())]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
    try:
        for process in started:
            if not process.stdout.readline():
                raise RuntimeError(f"a process beside ({neighbour}) ended with code {process.wait()}")
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def time_apart(
    makes: Mapping[str, Make],
    model: nn.Module,
    x: Tensor,
    rounds: int,
    round_ms: float,
    neighbours: Mapping[str, int],
    judge: Callable[[str, float | str], bool],
) -> tuple[dict[str, float], dict[str, Timing], dict[str, dict[str, list[float]]]]:
    """Time contenders on a CPU in turn, A B C A B C ..., each in a process of its own.

    Args:
        makes: {name: how to make it}. neighbours: see `beside`, {neighbour: how many processes of it}; single calls are
            timed beside each of them, too.
        judge: says of a name and its relative error, or why it failed, whether it takes part.

    Returns:
        Of those that take part: errors, times of the rounds, and for each neighbour times of single calls beside it.
    """
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name, make in makes.items():
            try:
                contender = Contender(make, model, x)
                stack.callback(contender.close)
                outcome: float | str = contender.error
            except Failed as failure:
                outcome = str(failure)
            if judge(name, outcome):
                contenders[name] = contender
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                times[name].append(contender.round_ms(round_ms))
        loaded: dict[str, dict[str, list[float]]] = {}
        for neighbour, processes in neighbours.items():
            loaded[neighbour] = {name: [] for name in contenders}
            with beside(neighbour, processes):
                for _ in range(rounds):
                    for name, contender in contenders.items():
                        loaded[neighbour][name] += contender.each_ms(round_ms)
        errors = {name: contender.error for name, contender in contenders.items()}
    return errors, {name: Timing(tuple(values)) for name, values in times.items()}, loaded
