"""From a model to a graph of its layers, with the shape of every value.

torch.fx's symbolic trace, not torch.export: it keeps module paths (the report speaks in them), keeps the
batch size open, and takes 0.1 s where export takes seconds. What it cannot follow (control flow on values) is
narrowed down by tracing the children instead, see `depthfuse.acceleration.planning.build`.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning.graph import has_hooks
from depthfuse.merging.merged_blocks import TokenBatchNorm

# Layers that stand for one operation although they are written in Python: the plan recognises them whole.
_LEAVES = (DropPath, LayerNorm, LayerNorm2d, TokenBatchNorm)

# What symbolic tracing raises where a model's control flow depends on values, or does things a proxy cannot
# stand for.
TRACE_ERRORS = (fx.proxy.TraceError, TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError)


class LayerTracer(fx.Tracer):
    """Traces down to torch.nn's layers and to timm's leaf modules; optional arguments keep their defaults."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (*_LEAVES, *get_notrace_modules())
        self._thread = threading.get_ident()

    # torch.fx patches nn.Module for the whole process while it traces: what other threads run is none of its business.

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, self._leaves) or has_hooks(module):
            return True
        return super().is_leaf_module(module, qualified_name)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        # A proxy for an optional argument would answer "is not None" wrongly: trace with the default itself.
        parameters = [
            p for p in inspect.signature(root_fn).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]
        for index, parameter in enumerate(parameters[: len(args)]):
            if parameter.default is not inspect.Parameter.empty and isinstance(args[index], fx.Proxy):
                self.graph.erase_node(args[index].node)
                args[index] = parameter.default
        return function, args


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
