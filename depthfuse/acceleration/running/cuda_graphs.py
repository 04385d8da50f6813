"""A plan's launches, captured once for each input shape and replayed (CUDA and HIP graphs).

At batch 1 a network of fifty kernels is bound by launching them: 5 to 10 us each from Python, 1 to 2 us in a replayed
graph. A capture belongs to one input shape and holds memory of its own, so a bounded number of them is kept, the least
recently used making room. What cannot be captured runs launch by launch, and is not tried again.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from depthfuse.kernels.counters import Counters

logger = logging.getLogger(__name__)

Call = Callable[..., Any]

LIMIT = 8  # shapes
LEAST_FILL = (
    0.75  # a batch is padded to a captured one if it fills this much of it: a replay costs less than launches
)
_WARM_UP_RUNS = 3


def capture(run: Call, inputs: tuple[Tensor, ...]) -> Call:
    """`run` for inputs of exactly these shapes and strides, as one replay on the caller's stream of their device.

    The outputs are copies, so that callers may keep them. One call at a time: the buffers are shared. Whoever calls
    this, and wherever, the capture has a scope of its own: buffers made in inference mode could not be written to
    outside it, and what is launched on another device than the inputs' would not be captured, and replay nothing.
    """
    device = inputs[0].device
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        static = tuple(
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x) for x in inputs
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        counters = Counters()
        with torch.cuda.stream(side), counters.in_use():
            # compiles kernels and lets libraries allocate, which a capture must not see
            for _ in range(_WARM_UP_RUNS):
                run(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # hipBLASLt keeps a handle for each stream: the one that warmed up must be the one that captures. Other threads
        # may wait for the card meanwhile, which the usual mode would not let them do.
        recording = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
        with _no_collection(), counters.in_use(), recording:
            outputs = run(*static)
        done = torch.cuda.Event()

    def replay(*given: Tensor) -> Any:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            stream.wait_event(done)  # of the call before, which may have been on another stream
            for buffer, x in zip(static, given, strict=True):
                buffer.copy_(x, non_blocking=True)
            graph.replay()
            copies = tree_map(lambda y: y.clone() if isinstance(y, Tensor) else y, outputs)
            done.record(stream)
        return copies

    replay.counters = counters  # they live as long as the graph that counts on them
    return replay


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage may hold a compiled kernel, and to unload one is not permitted in a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class GraphCache:
    """Calls `run` by replays of captures, at most `limit` of them.

    Args:
        run: inputs -> outputs, without autograd.
        batchwise: whether each image's output depends on that image alone and comes out as one tensor with the images
            first. Then a batch a little smaller than a captured one is padded up to it, instead of captured itself.
        limit: captures that are kept.
        capture: (run, inputs) -> a callable for inputs of the same shapes and strides.
    """

    def __init__(
        self, run: Call, batchwise: bool = False, limit: int = LIMIT, capture: Callable = capture
    ) -> None:
        self._run, self._batchwise, self._limit, self._capture = run, batchwise, limit, capture
        self._replays: OrderedDict[tuple, Call | None] = OrderedDict()  # None: cannot be captured
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Any:
        """Raises whatever `run` raises."""
        if any(x.numel() == 0 for x in inputs):
            return self._run(*inputs)
        with self._lock:
            key = _key(inputs)
            larger = None if key in self._replays else self._larger(inputs)
            if larger is not None:
                batch, size = inputs[0].shape[0], larger[0][0][0]
                padded = tuple(torch.cat([x, x[-1:].expand(size - batch, *x.shape[1:])]) for x in inputs)
                if _key(padded) == larger:
                    self._replays.move_to_end(larger)
                    return self._replays[larger](*padded)[:batch]
            if key not in self._replays:
                self._add(key, inputs)
            self._replays.move_to_end(key)
            replay = self._replays[key]
            if replay is not None:
                return replay(*inputs)
        return self._run(*inputs)

    def __len__(self) -> int:
        return sum(replay is not None for replay in self._replays.values())

    def _add(self, key: tuple, inputs: tuple[Tensor, ...]) -> None:
        try:
            replay = self._capture(self._run, inputs)
            _check_replay(self._run, replay, inputs)
            self._replays[key] = replay
        except RuntimeError as error:
            shapes = " and ".join(str(list(x.shape)) for x in inputs)
            reason = (str(error) or repr(error)).splitlines()[0]
            logger.warning("inputs of %s run launch by launch: they cannot be captured (%s)", shapes, reason)
            self._replays[key] = None
        if len(self._replays) > self._limit:
            self._replays.popitem(last=False)

    def _larger(self, inputs: tuple[Tensor, ...]) -> tuple | None:
        """The key of the smallest capture of a larger batch that these inputs fill well enough, or None."""
        if not self._batchwise:
            return None
        batch = inputs[0].shape[0]
        fitting = [
            key
            for key, replay in self._replays.items()
            if replay is not None
            and batch < key[0][0][0] <= batch / LEAST_FILL
            and all(
                k[0][1:] == tuple(x.shape[1:]) and k[2] == x.dtype for k, x in zip(key, inputs, strict=True)
            )
        ]
        return min(fitting, key=lambda key: key[0][0][0], default=None)


def _check_replay(run: Call, replay: Call, inputs: tuple[Tensor, ...]) -> None:
    """Raise RuntimeError where a replay does not give for other values what `run` gives for them.

    Not every driver reports a call that a capture cannot hold (HIP before ROCm 7.14 does not): its replays give stale
    or half-computed outputs, and nothing else would notice.
    """
    others = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in inputs)
    expected = [y for y in tree_leaves(run(*others)) if isinstance(y, Tensor)]
    given = [y for y in tree_leaves(replay(*others)) if isinstance(y, Tensor)]
    for got, wanted in zip(given, expected, strict=True):
        # split sums and atomics of a library may round differently from call to call
        tolerance = 1e-2 * wanted.abs().max() if wanted.numel() and wanted.is_floating_point() else 0.0
        if got.shape != wanted.shape or not torch.allclose(
            got, wanted, 0.0, float(tolerance), equal_nan=True
        ):
            raise RuntimeError("its replay gives other values than the launches that were captured")


def _key(inputs: tuple[Tensor, ...]) -> tuple:
    return tuple((tuple(x.shape), x.stride(), x.dtype) for x in inputs)
