"""A graph in the form that another project reads, and what runs that form on a CPU.

What is converted is in PyTorch's own operations: nobody else knows ours. OpenVINO and ONNX Runtime read ONNX;
ExecuTorch and PyTorch's own compilers take what `torch.export` makes of it.
"""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.ops.declare import DECOMPOSITIONS

Run = Callable[..., Sequence[Tensor]]


def in_own_operations(
    graph: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """A graph as `torch.export` gives it, in PyTorch's own operations.

    Args:
        dynamic_shapes: as for `torch.export.export`; None for inputs of exactly these shapes.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export about itself
        program = torch.export.export(graph, inputs, dynamic_shapes=dynamic_shapes)
        return program.run_decompositions(DECOMPOSITIONS)


def in_rows(graph: nn.Module) -> nn.Module:
    """A copy with weights that lie in no other order than their axes': ExecuTorch takes no others, and what the order
    does to the values behind it would stand in the program.
    """
    twin = copy.deepcopy(graph)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = tensor.data.contiguous()
    return twin


def onnx_of(
    model: nn.Module | torch.export.ExportedProgram,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
) -> bytes:
    """As `torch.onnx.export` writes it, which needs onnxscript.

    Args:
        input_names, output_names: None for names of PyTorch's choice. opset: of ONNX; None for PyTorch's choice.
    """
    buffer = io.BytesIO()
    names = {"input_names": input_names, "output_names": output_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx about itself
        torch.onnx.export(model, inputs, buffer, dynamo=True, verbose=False, opset_version=opset, **names)
    return buffer.getvalue()


def executorch_of(program: torch.export.ExportedProgram, constants: Mapping[str, str] | None = None) -> bytes:
    """For ExecuTorch with XNNPACK.

    constants: {method: the text that it gives}.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ExecuTorch about torch
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=constants
        )
        return lowered.to_executorch().buffer


def openvino(model: bytes | Path, threads: int, precision: str = "f32", pinned: bool = False) -> Run:
    """Several threads may call the result.

    model: ONNX, or a file of that or of OpenVINO's own form.
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
    network = core.compile_model(core.read_model(model), "CPU", options)
    local = threading.local()

    def run(*inputs: Tensor) -> list[Tensor]:
        if not hasattr(local, "request"):
            local.request = network.create_infer_request()
        results = local.request.infer([_array(x) for x in inputs], share_inputs=True)
        return [torch.from_numpy(results[output]) for output in network.outputs]

    return run


def onnxruntime(model: bytes | Path, threads: int) -> Run:
    """Several threads may call the result."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads spin between operators, which is fast, and after the last one, for longer than a call takes: what the
    # process did next, on the same cores, took twice its time. They are to stop with the call.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: _array(x) for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(result) for result in session.run(None, given)]

    return run


def executorch(program: bytes | Path, threads: int) -> Run:
    """Several threads may call the result, in turn. All of a process's programs share one pool of threads, so the
    number of the last one holds for all.
    """
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    loaded = Runtime.get().load_program(program)
    method, lock = loaded.load_method("forward"), threading.Lock()

    def run(*inputs: Tensor) -> list[Tensor]:
        with lock:  # its outputs lie in the program's own memory until the next call
            return [y.clone() for y in method.execute([x.detach().contiguous() for x in inputs])]

    run.kept = loaded  # type: ignore[attr-defined]  # a method does not keep its program
    return run


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()
