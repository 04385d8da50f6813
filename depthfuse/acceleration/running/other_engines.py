"""Run a whole plan through another project's engine, where that is installed, for one input shape on a CPU.

The engine is given the plan's graph, weights folded, in the form that it reads (`conversion.py`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning.part import as_tuple
from depthfuse.acceleration.running.conversion import (
    Run,
    executorch,
    executorch_of,
    in_own_operations,
    in_rows,
    onnx_of,
    onnxruntime,
    openvino,
)
from depthfuse.errors import AccelerationError
from depthfuse.untrusted import is_out_of_memory


class Exported:
    """A graph for inputs of exactly these shapes, exported when somebody asks, and then once for all who do."""

    def __init__(self, graph: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.graph, self.inputs = graph, inputs

    @functools.cached_property
    def program(self) -> torch.export.ExportedProgram:
        """In PyTorch's own operations."""
        return in_own_operations(self.graph, self.inputs)

    @functools.cached_property
    def onnx(self) -> bytes:
        return onnx_of(self.program, self.inputs)


def _executorch(exported: Exported, threads: int) -> Run:
    program = in_own_operations(in_rows(exported.graph), exported.inputs)
    return executorch(executorch_of(program), threads)


def _torch_compile(exported: Exported, backend: str = "inductor") -> Run:
    from torch._inductor import config

    compiled = torch.compile(exported.program.module(), dynamic=False, backend=backend)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        # Another grad mode than at the first call would compile again, and then without freezing.
        with torch.inference_mode(False), torch.no_grad():
            return as_tuple(compiled(*inputs))

    with config.patch(freezing=True):
        run(*exported.inputs)
    return run


def _zentorch(exported: Exported) -> Run:
    """AMD's plug-in for its EPYC processors: a backend of torch.compile, which is there once it is imported."""
    importlib.import_module("zentorch")
    return _torch_compile(exported, "zentorch")


@dataclass(frozen=True)
class OtherEngine:
    """make: from a graph to what runs it with so many threads. packages: what it needs beside torch; the first is the
    engine's own. quick: whether it compiles within seconds, so that "auto" tries it.
    """

    make: Callable[[Exported, int], Run]
    packages: tuple[str, ...] = ()
    quick: bool = True

    def missing(self) -> list[str]:
        return [package for package in self.packages if importlib.util.find_spec(package) is None]

    def version(self) -> str:
        return importlib.metadata.version(self.packages[0]) if self.packages else torch.__version__


OTHER_ENGINES: dict[str, OtherEngine] = {
    "openvino": OtherEngine(
        lambda exported, threads: openvino(exported.onnx, threads), ("openvino", "onnxscript")
    ),
    "onnxruntime": OtherEngine(
        lambda exported, threads: onnxruntime(exported.onnx, threads), ("onnxruntime", "onnxscript")
    ),
    "executorch": OtherEngine(_executorch, ("executorch",), quick=False),
    "torch.compile": OtherEngine(lambda exported, threads: _torch_compile(exported), quick=False),
    "zentorch": OtherEngine(lambda exported, threads: _zentorch(exported), ("zentorch",), quick=False),
}


def chosen_engines(engines: str | Sequence[str]) -> tuple[str, ...]:
    """The names in `OTHER_ENGINES` that "auto", "own" or a list of names stands for.

    Raises ValueError for an unknown name, AccelerationError for an engine asked for by name that is not installed.
    """
    if engines == "own":
        return ()
    if engines == "auto":
        return tuple(name for name, each in OTHER_ENGINES.items() if each.quick and not each.missing())
    names = (engines,) if isinstance(engines, str) else tuple(engines)
    for name in names:
        if name not in OTHER_ENGINES:
            known = ", ".join(map(repr, OTHER_ENGINES))
            raise ValueError(f"engines has {name!r}, expected 'auto', 'own' or some of {known}")
        if missing := OTHER_ENGINES[name].missing():
            raise AccelerationError(
                f"{name} cannot be tried without its packages: pip install {' '.join(missing)}"
            )
    return names


def compile_plan(name: str, exported: Exported) -> Callable[..., Any] | str:
    """A callable for inputs of exactly the exported shapes, with as many threads as PyTorch has now; or why the engine
    does not run the graph.
    """
    engine = OTHER_ENGINES[name]
    if missing := engine.missing():
        return f"{' and '.join(missing)} is not installed"
    with torch.no_grad():
        wanted = exported.graph(*exported.inputs)
    outputs = as_tuple(wanted)
    if not isinstance(exported.graph, fx.GraphModule) or not all(isinstance(y, Tensor) for y in outputs):
        return "it is no single graph that gives tensors"
    memories = [x.untyped_storage().data_ptr() for x in (*exported.inputs, *outputs)]
    if len(set(memories)) < len(memories):
        return "outputs share memory"
    single = isinstance(wanted, Tensor)
    try:
        run = engine.make(exported, torch.get_num_threads())
        found = [(y.shape, y.dtype) for y in run(*exported.inputs)]
    except Exception as error:  # whatever another project raises
        if is_out_of_memory(error):
            raise
        return (str(error).strip() or repr(error)).splitlines()[0]
    if found != [(y.shape, y.dtype) for y in outputs]:
        return f"it gives {found}"
    return lambda *inputs: run(*inputs)[0] if single else tuple(run(*inputs))
