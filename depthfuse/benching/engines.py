"""What a user could run a model with instead, each as one call of an image batch, for fair comparisons with ours.

Each engine is given the same weights and an input in the same layout and dtype. Optional packages take part where
they are installed: ONNX Runtime and OpenVINO go through torch.onnx.export, which needs onnxscript.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.running.conversion import (
    executorch,
    executorch_of,
    onnx_of,
    onnxruntime,
    openvino,
)
from depthfuse.acceleration.running.cuda_graphs import capture

OURS = "depthfuse"  # beside which all of `ENGINES` are measured

Call = Callable[[Tensor], Tensor]


def _eager(model: nn.Module, x: Tensor) -> Call:
    return model


def _eager_channels_last(model: nn.Module, x: Tensor) -> Call:
    twin: Any = copy.deepcopy(model)
    return twin.to(memory_format=torch.channels_last)


def _replayed(model: nn.Module, x: Tensor) -> Call:
    """In channels_last, its launches as one graph: what is left then is what the kernels take."""
    return capture(_eager_channels_last(model, x), (x,))


def _compiled(model: nn.Module, x: Tensor, backend: str = "inductor") -> Call:
    from torch._inductor import config

    torch._dynamo.reset()
    mode = "max-autotune" if x.is_cuda else None
    compiled = torch.compile(copy.deepcopy(model), mode=mode, backend=backend)

    def run(x: Tensor) -> Tensor:
        # Another grad mode than at the first call would compile again, and then without freezing.
        with torch.inference_mode():
            return compiled(x)

    with config.patch(freezing=not x.is_cuda):
        run(x)
    return run


def _onnxruntime(model: nn.Module, x: Tensor) -> Call:
    run = onnxruntime(onnx_of(model, (x,)), torch.get_num_threads())
    return lambda x: run(x)[0]


def _openvino(model: nn.Module, x: Tensor) -> Call:
    """In bfloat16 by its own way to it: a hint on a float32 graph, whose inputs and outputs stay float32. Its threads
    are tied to cores, as by default.
    """
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[x.dtype]
    graph = onnx_of(copy.deepcopy(model).float(), (x.float(),))
    run = openvino(graph, torch.get_num_threads(), precision, pinned=True)
    return lambda x: run(x.float())[0]


def _executorch(model: nn.Module, x: Tensor) -> Call:
    run = executorch(executorch_of(torch.export.export(model, (x,))), torch.get_num_threads())
    return lambda x: run(x)[0]


def _zentorch(model: nn.Module, x: Tensor) -> Call:
    """AMD's plug-in for its EPYC processors: a backend of torch.compile, which is there once it is imported."""
    importlib.import_module("zentorch")
    return _compiled(model, x, "zentorch")


@dataclass(frozen=True)
class Engine:
    """make: from a model and an example input to what runs it. packages: what it needs. dtypes: None for all."""

    make: Callable[[nn.Module, Tensor], Call]
    packages: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] | None = None
    on_gpu: bool = True
    on_cpu: bool = True


ENGINES: dict[str, Engine] = {
    "eager": Engine(_eager),
    "eager channels_last": Engine(_eager_channels_last),
    "eager replayed": Engine(_replayed, on_cpu=False),
    "torch.compile": Engine(_compiled),
    "onnxruntime": Engine(_onnxruntime, ("onnxruntime", "onnxscript"), (torch.float32,), on_gpu=False),
    "executorch": Engine(_executorch, ("executorch",), (torch.float32,), on_gpu=False),
    "openvino": Engine(_openvino, ("openvino", "onnxscript"), (torch.float32, torch.bfloat16), on_gpu=False),
    "zentorch": Engine(_zentorch, ("zentorch",), (torch.float32, torch.bfloat16), on_gpu=False),
}


def available(names: Sequence[str], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Those of `names` that are installed and can run in `dtype` on `device`."""

    def can_run(engine: Engine) -> bool:
        installed = all(importlib.util.find_spec(package) for package in engine.packages)
        fits = engine.dtypes is None or dtype in engine.dtypes
        return installed and fits and (engine.on_cpu if device.type == "cpu" else engine.on_gpu)

    return [name for name in names if can_run(ENGINES[name])]
