"""Run a whole plan through another project's engine, where that is installed, for one input shape on a CPU.

The engine is given the plan's graph, weights folded, in PyTorch's own operations: nobody else knows ours. OpenVINO and
ONNX Runtime read it as ONNX; ExecuTorch and torch.compile take what `torch.export` makes of it.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import importlib.util
import io
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning.part import as_tuple
from depthfuse.errors import AccelerationError
from depthfuse.ops.declare import DECOMPOSITIONS
from depthfuse.untrusted import is_out_of_memory

Run = Callable[..., Sequence[Tensor]]


class Exported:
    """A graph for inputs of exactly these shapes, exported when somebody asks, and then once for all who do."""

    def __init__(self, graph: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.graph, self.inputs = graph, inputs

    @functools.cached_property
    def program(self) -> torch.export.ExportedProgram:
        """In PyTorch's own operations."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.export about itself
            return torch.export.export(self.graph, self.inputs).run_decompositions(DECOMPOSITIONS)

    @functools.cached_property
    def onnx(self) -> bytes:
        return onnx_of(self.program, self.inputs)


def _in_rows(exported: Exported) -> torch.export.ExportedProgram:
    """With weights that lie in no other order than their axes': ExecuTorch takes no others."""
    twin = copy.deepcopy(exported.graph)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = tensor.data.contiguous()
    return Exported(twin, exported.inputs).program


def onnx_of(model: nn.Module | torch.export.ExportedProgram, inputs: tuple[Tensor, ...]) -> bytes:
    """As `torch.onnx.export` writes it, which needs onnxscript."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx about itself
        torch.onnx.export(model, inputs, buffer, dynamo=True, verbose=False)
    return buffer.getvalue()


def openvino(onnx: bytes, threads: int, precision: str = "f32", pinned: bool = False) -> Run:
    """Several threads may call the result.

    pinned: whether it may tie threads to cores, which is its default and ties the caller's, too.
    """
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": pinned,
    }
    network = core.compile_model(core.read_model(onnx), "CPU", options)
    local = threading.local()

    def run(*inputs: Tensor) -> list[Tensor]:
        if not hasattr(local, "request"):
            local.request = network.create_infer_request()
        results = local.request.infer([_array(x) for x in inputs], share_inputs=True)
        return [torch.from_numpy(results[output]) for output in network.outputs]

    return run


def onnxruntime(onnx: bytes, threads: int) -> Run:
    """Several threads may call the result."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: _array(x) for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(result) for result in session.run(None, given)]

    return run


def executorch(program: torch.export.ExportedProgram, threads: int) -> Run:
    """On XNNPACK. Several threads may call the result, in turn. All of a process's programs share one pool of threads,
    so the number of the last one holds for all.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ExecuTorch about torch
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    loaded = Runtime.get().load_program(lowered.buffer)
    method, lock = loaded.load_method("forward"), threading.Lock()

    def run(*inputs: Tensor) -> list[Tensor]:
        with lock:  # its outputs lie in the program's own memory until the next call
            return [y.clone() for y in method.execute([x.detach().contiguous() for x in inputs])]

    run.kept = loaded  # type: ignore[attr-defined]  # a method does not keep its program
    return run


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _torch_compile(exported: Exported) -> Run:
    from torch._inductor import config

    compiled = torch.compile(exported.program.module(), dynamic=False)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        # Another grad mode than at the first call would compile again, and then without freezing.
        with torch.inference_mode(False), torch.no_grad():
            return as_tuple(compiled(*inputs))

    with config.patch(freezing=True):
        run(*exported.inputs)
    return run


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
    "executorch": OtherEngine(
        lambda exported, threads: executorch(_in_rows(exported), threads), ("executorch",), quick=False
    ),
    "torch.compile": OtherEngine(lambda exported, threads: _torch_compile(exported), quick=False),
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
