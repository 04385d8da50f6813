"""Counters for kernels whose programs must know which of them arrives last: int32 zeros that are left as zeros.

Launches that may run at the same time must not count on the same ones. On a stream they run one after another, so a
buffer for each stream serves all of its launches. A captured graph is replayed on any stream, beside any other graph:
it brings a buffer of its own (`Counters.in_use`), made before the capture, so that no replay has to fill it.

Nothing of Triton is imported here, because graphs are captured where there is no Triton, too.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch

_LEAST = 1024  # counters in a buffer: more than a launch whose reduction is split has tiles

_local = threading.local()


class Counters:
    """A buffer of counters on one device, for launches that never run at the same time."""

    def __init__(self) -> None:
        self._zeros: torch.Tensor | None = None

    def take(self, count: int, device: torch.device) -> torch.Tensor:
        """int32 [at least `count`] of zeros, the same ones every time, for a launch that leaves zeros behind."""
        if self._zeros is None or self._zeros.numel() < count:
            self._zeros = torch.zeros(max(count, _LEAST), dtype=torch.int32, device=device)
        return self._zeros

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """What this thread launches within counts on this buffer. Keep it alive as long as a graph that holds it."""
        before = getattr(_local, "counters", None)
        _local.counters = self
        try:
            yield
        finally:
            _local.counters = before


_of_stream: dict[tuple[torch.device, int], Counters] = {}


def counters(count: int, device: torch.device) -> torch.Tensor:
    """int32 [at least `count`] of zeros, for a launch on the current stream of `device` that leaves zeros behind."""
    own = getattr(_local, "counters", None)
    if own is not None:
        return own.take(count, device)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # Of a graph that somebody else captures nothing is known but that these zeros are its own.
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    return _of_stream.setdefault(key, Counters()).take(count, device)
