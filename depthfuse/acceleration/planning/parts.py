"""The graphs that a plan is made of, those of the model that they stand for, and running one call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning.build import capture_watched, record_calls
from depthfuse.acceleration.planning.part import PlannedPart
from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.planning.signature import signature_of

_CALLS = ("call_function", "call_method", "call_module")


class Given(NamedTuple):
    """A graph and what it is given."""

    graph: fx.GraphModule
    inputs: tuple[Tensor, ...]

    def clones(self) -> tuple[Tensor, ...]:
        """It may write over them."""
        return tuple(x.clone() for x in self.inputs)


def parts_of(plan: nn.Module) -> dict[str, fx.GraphModule]:
    """The graphs of a plan by the paths of what they stand for; "" is the path of a plan that is one graph."""
    if isinstance(plan, fx.GraphModule):
        return {"": plan}
    return {name: m.graph for name, m in plan.named_modules() if isinstance(m, PlannedPart)}


def parts_given(plan: Plan, call: Call) -> dict[str, Given]:
    """Each graph of a plan, and what it is given at its first call when the plan runs; those that are not called are
    left out.

    call: in the plan's dtypes.
    """
    if isinstance(plan.module, fx.GraphModule):
        return {"": Given(plan.module, call.tensors)}
    seen: dict[str, Given] = {}

    def keep(name: str):
        def hook(graph: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(graph, fx.GraphModule)
            seen.setdefault(name, Given(graph, tuple(x.clone() for x in args)))

        return hook

    handles = [graph.register_forward_pre_hook(keep(name)) for name, graph in parts_of(plan.module).items()]
    try:
        with torch.no_grad():
            args, kwargs = call.on_clones().arguments()
            plan.module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def programs_given(model: nn.Module, parts: Iterable[str], call: Call, dynamic: bool) -> dict[str, Given]:
    """What a model computes in each of `parts`, captured anew, and what it is given there at its first call; those that
    are not called are left out.

    dynamic: as it was captured for the plan, so that values have the same names.

    Raises:
        KeyError: the model has no such part. CaptureError: a part cannot be captured.
    """
    parts = list(parts)
    if parts == [""]:
        return {"": Given(capture_watched(model, call, dynamic).graph, call.tensors)}
    layers, calls = dict(model.named_modules()), record_calls(model, call)
    found = {}
    for part in parts:
        layer = layers[part]
        if layer in calls:
            inner = Call.of(*signature_of(layer).bind(*calls[layer][0]))
            found[part] = Given(capture_watched(layer, inner, dynamic).graph, inner.tensors)
    return found


class CallByCall(fx.Interpreter):
    """Runs a graph and hands each call, with its arguments, to `run`, which makes it and returns its value."""

    def __init__(
        self, graph: fx.GraphModule, run: Callable[[fx.Node, tuple, dict, Callable[[], Any]], Any]
    ) -> None:
        super().__init__(graph)
        self._run = run

    def run_node(self, node: fx.Node) -> Any:
        if node.op not in _CALLS:
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return self._run(node, args, kwargs, lambda: getattr(self, node.op)(node.target, args, kwargs))
