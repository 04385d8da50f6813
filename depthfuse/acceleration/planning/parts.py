"""The graphs that a plan is made of, what each of them is given, and running one call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

_CALLS = ("call_function", "call_method", "call_module")


def parts_of(plan: nn.Module) -> dict[str, fx.GraphModule]:
    """The graphs of a plan by their paths in it; "" is the path of a plan that is one graph."""
    return {name: m for name, m in plan.named_modules() if isinstance(m, fx.GraphModule)}


def first_inputs(
    model: nn.Module, parts: dict[str, nn.Module], inputs: tuple[Tensor, ...]
) -> dict[str, tuple[Tensor, ...]]:
    """What each of `parts` is given at its first call when `model` runs; parts that are not called are left out."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, tuple(x.clone() for x in args))  # it may write over them

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in parts.items()]
    try:
        with torch.no_grad():
            model(*(x.clone() for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def cast(inputs: tuple[Tensor, ...], model: nn.Module) -> tuple[Tensor, ...]:
    """Floating-point inputs in the dtype of `model`'s weights; as they are for a model without any."""
    tensors = [*model.parameters(), *model.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), None)
    return tuple(x.to(dtype) if dtype is not None and x.is_floating_point() else x for x in inputs)


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, list | tuple) else []


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
