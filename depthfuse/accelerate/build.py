"""From a model to its plan: trace, simplify, fuse, own, pack. Where tracing fails, the same for the
children.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from depthfuse.accelerate.elements import is_no_op
from depthfuse.accelerate.fuse import fuse
from depthfuse.accelerate.graph import fold_constants, own_layers, path_of, redirect_in_place
from depthfuse.accelerate.report import Entry
from depthfuse.accelerate.trace import TRACE_ERRORS, record_shapes, trace

logger = logging.getLogger(__name__)

# Nodes that compute nothing: the report leaves them out.
_VIEWS = frozenset(
    [
        *("view", "reshape", "permute", "transpose", "flatten", "unbind", "expand", "unflatten", "squeeze"),
        *("unsqueeze", "chunk", "split", "contiguous", "getitem", "getattr", "size", "dim", "eq", "_assert"),
    ]
)


@dataclass
class Plan:
    """What runs (a module) and what it is made of."""

    module: nn.Module
    entries: list[Entry] = field(default_factory=list)


def build_plan(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, backend: str) -> Plan:
    """Plan `model` for inputs like `inputs`; the model is left alone and shares nothing with the plan.

    Args:
        model: in evaluation mode.
        inputs: example inputs in the model's dtype; batch and image size may differ later.
        dtype: of the plan. backend: see `depthfuse.ops.resolve_backend`.
    """
    try:
        graph = _trace_and_run(model, inputs)
    except TRACE_ERRORS as error:
        logger.info("%s cannot be traced as a whole (%s): planning its children", type(model).__name__, error)
        return _plan_children(model, inputs, dtype, backend)
    return _plan_graph(graph, dtype, backend)


def _trace_and_run(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph of `model`, simplified, with shapes. Raises one of TRACE_ERRORS where it has none that runs."""
    graph = trace(model)
    redirect_in_place(graph)
    for node in list(graph.graph.nodes):
        if is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    fold_constants(graph)
    record_shapes(graph, inputs)
    return graph


def _plan_graph(graph: fx.GraphModule, dtype: torch.dtype, backend: str) -> Plan:
    origins = fuse(graph, dtype, backend)
    graph = own_layers(graph).to(dtype)
    return Plan(graph, _entries(graph, origins))


def _entries(graph: fx.GraphModule, origins: dict[str, list[str]]) -> list[Entry]:
    entries = []
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target in origins:
            module = graph.get_submodule(node.target)
            path, *others = origins[node.target]
            epilogue = module.epilogue() + (" + residual" if len(node.args) > 1 else "")
            kind = type(module).__name__
            entries.append(Entry(path, kind, "", epilogue, tuple(others), True, node.target))
        elif node.op == "call_module":
            kind = type(graph.get_submodule(node.target)).__name__
            entries.append(Entry(path_of(node), kind, "eager", "", (), False))
        elif node.op in ("call_function", "call_method"):
            kind = node.target if isinstance(node.target, str) else node.target.__name__
            if kind not in _VIEWS:
                entries.append(Entry(path_of(node), kind, "eager", "", (), False))
    return entries


def _plan_children(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, backend: str) -> Plan:
    calls = _record_calls(model, inputs)
    root = copy.deepcopy(model)
    plan = Plan(root)
    for name, child in model.named_children():
        _replace(root, name, name, child, calls, plan, dtype, backend)
    root.to(dtype)
    return plan


def _record_calls(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[nn.Module, list[tuple[tuple, dict]]]:
    """The arguments of every call of every submodule in one run."""
    calls: dict[nn.Module, list[tuple[tuple, dict]]] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.setdefault(module, []).append((args, kwargs))

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        with torch.no_grad():
            model(*(x.clone() for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _replace(parent, name: str, path: str, child: nn.Module, calls, plan: Plan, dtype, backend) -> None:
    """Put a plan in the place of `parent.name`, or of the children below it where that cannot be planned."""
    seen = calls.get(child, [])
    tensors_only = len(seen) >= 1 and all(
        not k and all(isinstance(a, Tensor) for a in args) for args, k in seen
    )
    if tensors_only:
        holder = nn.Sequential(child) if not list(child.children()) else child
        try:
            graph = _trace_and_run(holder, seen[0][0])
        except TRACE_ERRORS as error:
            logger.debug("%s cannot be traced (%s)", path, error)
        else:
            part = _plan_graph(graph, dtype, backend)
            setattr(parent, name, part.module)
            plan.entries += [entry.inside(path) for entry in part.entries]
            return
    if not list(child.children()):
        if seen:
            plan.entries.append(Entry(path, type(child).__name__, "eager", "", (), False))
        return
    for inner_name, inner in child.named_children():
        _replace(
            getattr(parent, name),
            inner_name,
            f"{path}.{inner_name}",
            inner,
            calls,
            plan,
            dtype,
            backend,
        )
