"""From a plan's graph to a plan of the native engine."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from depthfuse.acceleration.running.native_rules import FUNCTIONS, MODULES
from depthfuse.acceleration.running.native_values import (
    FLAT,
    IMAGE,
    ROWS,
    TOKENS,
    Algorithms,
    Constant,
    Draft,
    Unsupported,
    Value,
)
from depthfuse.native import plan as native
from depthfuse.native.plan import Node


class Lowering(fx.Interpreter):
    """Walks the graph with values of the engine in the place of tensors; `native_rules` has each operation."""

    def __init__(self, graph: fx.GraphModule, algorithms: Algorithms, tiles: int = native.TILES) -> None:
        super().__init__(graph)
        self.draft = Draft(algorithms, tiles)
        self.builder = self.draft.builder
        self._made: dict[fx.Node, Node] = {}  # by which node of the engine a node's result was written

    def lower(self, inputs: Sequence[Tensor]) -> tuple[list[tuple[int, ...]], bool]:
        """Fill `builder` for inputs of these shapes: (shapes of the outputs, whether there is one outside a tuple).

        Raises Unsupported.
        """
        given = [self._input(x) for x in inputs]
        result = self.run(*given, enable_io_processing=False)
        single = isinstance(result, Value)
        values = [result] if single else list(result)
        tensors = [value.tensor for value in (*given, *values) if isinstance(value, Value)]
        if len(set(tensors)) < len(tensors):
            raise Unsupported("an output that shares its memory with an input or another output")
        return [self._output(value) for value in values], single

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("placeholder", "get_attr", "call_module", "call_function", "output"):
            raise Unsupported(f"{n.op} {n.target}")
        source, before = n.args[0] if n.args else None, len(self.builder.nodes)
        alone = isinstance(source, fx.Node) and len(source.users) == 1
        self.draft.writer = self._made.get(source) if alone else None
        result = super().run_node(n)
        added = self.builder.nodes[before:]
        for node in added:
            node.names.append(n.name)
        if added and isinstance(result, Value):
            self._made[n] = added[-1]
        elif self.draft.writer is not None:  # what wrote the input computes this, too, or it is a view
            self.draft.writer.names.append(n.name)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return Constant(super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Value:
        module = self.fetch_attr(target)
        lower = MODULES.get(type(module))
        if lower is None or kwargs:
            raise Unsupported(f"{type(module).__name__} {target}")
        return lower(self.draft, module, *args)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not any(isinstance(a, Value) for a in tree_leaves((args, kwargs))):
            return self._constant(target, args, kwargs)
        lower = FUNCTIONS.get(target)
        if lower is None or not _takes(lower, (self.draft, *args), kwargs):
            raise Unsupported(str(target))
        return lower(self.draft, *args, **kwargs)

    # Tensors of the engine.

    def _input(self, x: Tensor) -> Value:
        if x.dim() == 4:
            n, c, h, w = x.shape
            source = self.builder.tensor((n, h, w, c), native.INPUT)
            y = self.builder.tensor((n, h, w, c))
            self.builder.nodes.append(Node(native.FROM_PLANES, source, y))
            return Value(y, IMAGE)
        if x.dim() in (2, 3):
            shape = (x.shape[0], 1, math.prod(x.shape[1:-1]), x.shape[-1])
            source, y = self.builder.tensor(shape, native.INPUT), self.builder.tensor(shape)
            self.builder.copy(source, y)
            return Value(y, ROWS if x.dim() == 2 else TOKENS)
        raise Unsupported(f"an input of {x.dim()} axes")

    def _output(self, value: Any) -> tuple[int, ...]:
        """The shape that PyTorch sees of a result, which is copied out of the arena."""
        if not isinstance(value, Value):
            raise Unsupported("an output that does not depend on the input")
        y = self.builder.tensor(self.draft.shape(value), native.OUTPUT)
        if value.axes[-1] == "c":
            self.builder.copy(value.tensor, y)
        elif value.axes in (IMAGE, ("n", "c", "hw"), FLAT):
            self.builder.nodes.append(Node(native.TO_PLANES, value.tensor, y))
        else:
            raise Unsupported(f"an output with the axes {value.axes}")
        return self.draft.size(value)

    def _constant(self, target: Any, args: Any, kwargs: Any) -> Any:
        plain = fx.node.map_aggregate(args, lambda a: a.values if isinstance(a, Constant) else a)
        result = target(*plain, **kwargs)
        return Constant(result) if isinstance(result, Tensor) else result


def _takes(rule: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> bool:
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
