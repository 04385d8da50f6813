"""What the processes of one run do alike: decisions are taken by one and told to all, and an error of one ends all.

Processes that look at the disk by themselves may see different files, take different roads and wait for each other for
ever. With one process all of this costs nothing. Answers and errors travel as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from depthfuse import errors

T = TypeVar("T")


def on_one(accelerator: Accelerator, work: Callable[[], T], process: int = 0) -> T:
    """Do `work` in one process, the main one by default; every process gets its answer, which must be JSON.

    Where it raises, all raise: the others an error of the same class and message.
    """
    if accelerator.num_processes == 1:
        return work()
    answer, error = None, None
    if accelerator.process_index == process:
        try:
            answer = work()
        except Exception as raised:
            error = raised
    _raise_alike(accelerator, error)
    return _tell(accelerator, answer, process)


def on_all(accelerator: Accelerator, work: Callable[[], T], main_first: bool = False) -> T:
    """Do `work` in every process; where it raises in one, all raise. `work` must not wait for other processes.

    main_first: the others begin when the main process is done, and find what it has left.
    """
    answer: Any = None
    error = None
    for turn in (True, False) if main_first else (None,):
        if turn is None or turn == accelerator.is_main_process:
            try:
                answer = work()
            except Exception as raised:
                error = raised
        _raise_alike(accelerator, error)
    return answer


def share_buffers(accelerator: Accelerator, net: nn.Module) -> None:
    """Give every process the main one's buffers, in place.

    Data parallelism keeps parameters equal, but batch norm statistics are of the images that a process has seen.
    """
    if accelerator.num_processes > 1:
        for buffer in net.buffers():
            broadcast(buffer)


def _raise_alike(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise this process's own error, or else that of the first process with one."""
    if accelerator.num_processes > 1:
        failed = torch.tensor([error is not None], dtype=torch.uint8, device=accelerator.device)
        ranks = accelerator.gather(failed).nonzero().flatten().tolist()
        if ranks:
            told = _tell(accelerator, None if error is None else [type(error).__name__, str(error)], ranks[0])
            if error is None:
                raise _rebuilt(*told)
    if error is not None:
        raise error


def _rebuilt(name: str, text: str) -> Exception:
    """An error of another process; what is not ours and may want other arguments becomes a RuntimeError."""
    kind = OSError if name == "OSError" else getattr(errors, name, None)
    return kind(text) if kind is not None else RuntimeError(f"another process ended with {name}: {text}")


def _tell(accelerator: Accelerator, answer: Any, process: int) -> Any:
    """What `process` gives as `answer`, in every process."""
    data = json.dumps(answer).encode()
    length = broadcast(torch.tensor([len(data)], device=accelerator.device), from_process=process)
    if accelerator.process_index == process:
        text = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(accelerator.device)
    else:
        text = torch.empty(int(length), dtype=torch.uint8, device=accelerator.device)
    return json.loads(bytes(broadcast(text, from_process=process).tolist()))
