"""From a model to its plan: trace, simplify, fuse, own. Where tracing fails, the same for the children."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from depthfuse.acceleration.planning.canonical import canonicalise
from depthfuse.acceleration.planning.elements import is_no_op
from depthfuse.acceleration.planning.fuse import fuse
from depthfuse.acceleration.planning.graph import fold_constants, origin_of, own_layers, redirect_in_place
from depthfuse.acceleration.planning.parts import cast
from depthfuse.acceleration.planning.plan import Entry, Plan
from depthfuse.acceleration.planning.trace import TRACE_ERRORS, record_shapes, trace
from depthfuse.fused.layers import FusedModule
from depthfuse.merging.tracing import has_hooks
from depthfuse.spec import ModelSource

logger = logging.getLogger(__name__)

# Nodes that compute nothing: the report leaves them out.
_VIEWS = frozenset(
    [
        *("view", "reshape", "permute", "transpose", "flatten", "unbind", "expand", "unflatten", "squeeze"),
        *("unsqueeze", "chunk", "split", "contiguous", "getitem", "getattr", "size", "dim", "eq", "_assert"),
    ]
)


class Planned(NamedTuple):
    """What runs, or a part of it, and what it is made of."""

    module: nn.Module
    entries: list[Entry]


def build_plan(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, backend: str) -> Plan:
    """Plan `model` for inputs like `inputs`; the model is left alone and shares nothing with the plan.

    Args:
        model: in evaluation mode.
        inputs: example inputs in the model's dtype; batch and image size may differ later.
        dtype: of the plan. backend: see `depthfuse.ops.resolve_backend`.
    """
    module, entries = _plan(model, inputs, dtype, backend)
    return Plan(
        module,
        tuple(entries),
        model=type(model).__name__,
        dtype=dtype,
        example=tuple((tuple(x.shape), x.dtype) for x in inputs),
        in_channels=inputs[0].shape[1] if len(inputs) == 1 and inputs[0].dim() == 4 else None,
        source=ModelSource.of(model),
    )


def _plan(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, backend: str) -> Planned:
    if has_hooks(model):
        logger.info("%s has hooks of its own: planning its children", type(model).__name__)
        return _plan_children(model, inputs, dtype, backend)
    try:
        graph = trace_simplified(model)
        record_shapes(graph, inputs)
    except TRACE_ERRORS as error:
        logger.info("%s cannot be traced as a whole (%s): planning its children", type(model).__name__, error)
        return _plan_children(model, inputs, dtype, backend)
    module, entries = _plan_graph(graph, dtype, backend)
    if not list(model.children()):
        entries = [replace(entry, path="") for entry in entries]
    return _plan_inside_leaves(Planned(module, entries), model, inputs, dtype, backend)


def trace_simplified(model: nn.Module) -> fx.GraphModule:
    """The graph of `model` in PyTorch's own layers and without what computes nothing; the same names each time.

    Raises one of TRACE_ERRORS. A layer without children is traced as one node.
    """
    graph = trace(model if list(model.children()) else nn.Sequential(model))
    for node in graph.graph.nodes:
        node.type = None  # an annotation, which says nothing here
    canonicalise(graph)
    redirect_in_place(graph)
    for node in list(graph.graph.nodes):
        if is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    fold_constants(graph)
    return graph


def _plan_graph(graph: fx.GraphModule, dtype: torch.dtype, backend: str) -> Planned:
    fuse(graph, dtype, backend)
    graph = own_layers(graph).to(dtype)
    return Planned(graph, _entries(graph))


def _entries(graph: fx.GraphModule) -> list[Entry]:
    entries = []
    for node in graph.graph.nodes:
        origin = origin_of(node)
        path, *others = origin.paths
        if node.op == "call_module":
            module = graph.get_submodule(node.target)
            kind, fused = type(module).__name__, isinstance(module, FusedModule)
            epilogue = module.epilogue() + (" + residual" if len(node.args) > 1 else "") if fused else ""
            target = node.target
        elif node.op in ("call_function", "call_method"):
            kind = node.target if isinstance(node.target, str) else node.target.__name__
            fused, epilogue, target = False, "", ""
            if kind in _VIEWS:
                continue
        else:
            continue
        entry = Entry(path, kind, "" if fused else "eager", epilogue, tuple(others), fused, target)
        entries.append(replace(entry, node=node.name, nodes=origin.nodes))
    return entries


def _plan_children(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, backend: str) -> Planned:
    return _plan_inside(model, "", record_calls(model, inputs), dtype, backend)


def _plan_inside_leaves(
    plan: Planned, model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, backend: str
) -> Planned:
    """Plan the children of modules that the graph calls as a whole, because they have hooks or cannot be traced."""
    entries = []
    calls = None
    for entry in plan.entries:
        entries.append(entry)
        if entry.fused or not entry.module or not list(plan.module.get_submodule(entry.module).children()):
            continue
        calls = calls or record_calls(model, inputs)
        leaf, inner = _plan_inside(model.get_submodule(entry.path), entry.path, calls, dtype, backend)
        if any(e.fused for e in inner):
            plan.module.set_submodule(entry.module, leaf)
            entries += inner
    return Planned(plan.module, entries)


def _plan_inside(module: nn.Module, path: str, calls, dtype, backend) -> Planned:
    """A copy of `module` with its children planned, as far as it still runs then, and the entries of these."""
    planned = copy.deepcopy(module)
    entries = []
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        entries += _replace(planned, name, inner, child, calls, dtype, backend)
    planned.requires_grad_(False).to(dtype)
    args, kwargs = tree_map_only(Tensor, lambda x: cast((x,), planned)[0], calls[module][0])
    try:
        with torch.no_grad():
            planned(*args, **kwargs)
    except (AttributeError, RuntimeError, TypeError) as error:
        # It reads more of a child than its output.
        logger.info("%s does not run with planned children (%s): it stays", type(module).__name__, error)
        unplanned = copy.deepcopy(module).requires_grad_(False).to(dtype)
        return Planned(unplanned, [Entry(path, type(module).__name__, "eager", "", (), False)])
    return Planned(planned, entries)


def record_calls(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[nn.Module, list[tuple[tuple, dict]]]:
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


def _replace(parent, name: str, path: str, child: nn.Module, calls, dtype, backend) -> list[Entry]:
    """Put a plan in the place of `parent.name`, or of the children below it where that cannot be planned."""
    seen = calls.get(child, [])
    tensors_only = all(not k and all(isinstance(a, Tensor) for a in args) for args, k in seen)
    if seen and tensors_only and not has_hooks(child):
        try:
            graph = trace_simplified(child)
            record_shapes(graph, seen[0][0])
        except TRACE_ERRORS as error:
            logger.debug("%s cannot be traced (%s)", path, error)
        else:
            part = _plan_graph(graph, dtype, backend)
            if any(entry.fused for entry in part.entries):
                setattr(parent, name, part.module)
                return [entry.inside(path, is_layer=not list(child.children())) for entry in part.entries]
    entries = []
    for inner_name, inner in child.named_children():
        inner_parent = getattr(parent, name)
        entries += _replace(inner_parent, inner_name, f"{path}.{inner_name}", inner, calls, dtype, backend)
    if any(entry.fused for entry in entries):
        return entries
    return [Entry(path, type(child).__name__, "eager", "", (), False)] if seen else []
