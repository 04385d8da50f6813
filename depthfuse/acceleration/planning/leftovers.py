"""What PyTorch keeps of each capture until the process ends (0.6 MB for a ResNet-18), and how it is freed.

torch.fx notes the source of all code that it generates, for tracebacks, and forgets none of it. The environment of a
capture's symbolic sizes and the fake tensors that it tracks hold each other, partly from C++, where Python's collector
does not see it; and the results of its methods are remembered for all environments at once, under their names.
"""

from __future__ import annotations

import contextlib
import linecache
import threading
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import fx, nn
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from depthfuse.merging.tracing import one_at_a_time

_sources: Any = getattr(graph_module, "_loader", None)


@contextlib.contextmanager
def sources_forgotten() -> Iterator[list[nn.Module]]:
    """Forget the sources of what this thread lets torch.fx generate inside; those of the modules that are appended to
    the list are kept as long as these live, which is as long as somebody else holds them.
    """
    keys: list[str] = []
    kept: list[nn.Module] = []
    with _watched(type(_sources), "cache", lambda _loader, key: keys.append(key)):
        try:
            yield kept
        finally:
            graphs = [m for module in kept for m in module.modules() if isinstance(m, fx.GraphModule)]
            living = {type(graph).forward.__code__.co_filename: graph for graph in graphs}
            for graph in graphs:
                no_circle(graph)
            for key in keys:
                if key in living:
                    weakref.finalize(living[key], _forget, key).atexit = False
                else:
                    _forget(key)


def no_circle(graph: fx.GraphModule) -> None:
    """Let go of a module, and of the weights in it, as soon as nobody holds it: it and its graph hold each other, and
    Python's collector may come late, as it counts objects and not their bytes. A graph needs its module to be extended.
    """
    graph.graph.owning_module = None


def _forget(key: str) -> None:
    _sources.eval_cache.pop(key, None)
    linecache.cache.pop(key, None)


@contextlib.contextmanager
def environments_freed() -> Iterator[None]:
    """Part the environments of symbolic sizes that this thread makes inside from what holds them. Their sizes can be
    read and compared afterwards, but nothing can be exported in them any more.
    """
    made: list[ShapeEnv] = []
    with _watched(ShapeEnv, "__init__", lambda environment, _: made.append(environment)):
        try:
            yield
        finally:
            for environment in made:
                environment.tracked_fakes = None
            for method in vars(ShapeEnv).values():
                if hasattr(method, "cache_clear"):
                    method.cache_clear()


@contextlib.contextmanager
def _watched(owner: type, name: str, note: Any) -> Iterator[None]:
    """Call `note(self, result)` after each call of a method in this thread; one that is not there is never called."""
    thread = threading.get_ident()
    with one_at_a_time, contextlib.ExitStack() as stack:
        method = getattr(owner, name, None)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            assert method is not None
            result = method(self, *args, **kwargs)
            if threading.get_ident() == thread:
                note(self, result)
            return result

        if method is not None:
            stack.enter_context(mock.patch.object(owner, name, watched))
        yield
