"""From a model to a graph of its layers, with the shape of every value.

torch.fx's symbolic trace, not torch.export: it keeps module paths (the report speaks in them), keeps the
batch size open, and takes 0.1 s where export takes seconds. What it cannot follow (control flow on values) is
narrowed down by tracing the children instead, see `depthfuse.acceleration.planning.build`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.merging.tracing import LayerTracer

# What symbolic tracing raises where a model's control flow depends on values, or does things a proxy cannot
# stand for.
TRACE_ERRORS = (fx.proxy.TraceError, TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError)


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace `model`; the graph module shares its layers. Raises one of TRACE_ERRORS where that is
    impossible.
    """
    graph = LayerTracer().trace(model)
    return fx.GraphModule(model, graph, type(model).__name__)


class ShapeRecorder(fx.Interpreter):
    """Runs a graph once and writes every tensor's shape and dtype into `node.meta["shape"]` and
    `["dtype"]`.
    """

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            node.meta["shape"] = tuple(value.shape)
            node.meta["dtype"] = value.dtype
        return value


def record_shapes(plan: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Any:
    """Annotate `plan` with the shapes that `inputs` give; returns the output."""
    with torch.no_grad():
        return ShapeRecorder(plan).run(*(x.clone() for x in inputs))
