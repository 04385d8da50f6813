"""Small questions to ask and changes to make on an fx graph."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from depthfuse.fused.layers import FusedModule


def module_of(node: fx.Node) -> nn.Module:
    """The module that a call_module node calls."""
    return node.graph.owning_module.get_submodule(node.target)


def attribute_of(plan: fx.GraphModule, path: str) -> object:
    """The parameter, buffer or other attribute at a dotted path."""
    value: object = plan
    for name in path.split("."):
        value = getattr(value, name)
    return value


def constant_of(node: object) -> Tensor | None:
    """The tensor that a get_attr node reads, or None for anything else."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = attribute_of(node.graph.owning_module, node.target)
        return value if isinstance(value, Tensor) else None
    return None


def path_of(node: fx.Node) -> str:
    """The original module path that the node's work came from, for the report."""
    if "path" in node.meta:
        return node.meta["path"]
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    inside = list(stack.values())[-1][0] if stack else ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{inside}:{name}" if inside else name


def free_name(plan: fx.GraphModule, wanted: str, prefix: str) -> str:
    """A top-level attribute name, made from `prefix` and `wanted`, that the plan does not use yet."""
    base = prefix + wanted.replace(".", "_").replace(":", "_")
    name, count = base, 1
    while hasattr(plan, name):
        count += 1
        name = f"{base}_{count}"
    return name


@dataclass(frozen=True)
class Origin:
    """What a node of a plan stands for: nodes of the traced model, by name, the last one last, and their paths."""

    nodes: tuple[str, ...]
    paths: tuple[str, ...]


def origin_of(node: fx.Node) -> Origin:
    """The origin of a fused module's call, or of a node that is left as it was."""
    return node.meta.get("origin") or Origin((node.name,), (path_of(node),))


def value_name(node: fx.Node) -> str:
    """The name of the node of the traced model whose value this node has."""
    return node.meta.get("value_of", node.name)


def mark_value(node: fx.Node, original: fx.Node) -> None:
    """Write down that `node` has the value that `original` had, and its shape and dtype."""
    node.meta["value_of"] = value_name(original)
    node.meta |= {key: original.meta[key] for key in ("shape", "dtype") if key in original.meta}


def insert_fused(
    plan: fx.GraphModule, module: FusedModule, args: tuple[fx.Node, ...], nodes: Sequence[fx.Node]
) -> fx.Node:
    """A call of `module`, at the graph's insertion point, that stands for `nodes`, in the order that they ran."""
    name = free_name(plan, path_of(nodes[0]), prefix="fused_")
    plan.add_submodule(name, module)
    call = plan.graph.call_module(name, args)
    origins = [origin_of(node) for node in nodes]
    call.meta["origin"] = Origin(
        tuple(name for origin in origins for name in origin.nodes),
        tuple(path for origin in origins for path in origin.paths),
    )
    call.meta["dtype"] = nodes[-1].meta.get("dtype")
    return call


def own_layers(plan: fx.GraphModule) -> fx.GraphModule:
    """The plan with only what it calls, and copies of that: nothing is shared with the model."""
    owned = fx.GraphModule(plan, plan.graph, type(plan).__name__)
    memo: dict[int, object] = {}
    copied: set[str] = set()
    clones: dict[int, Tensor] = {}
    # Modules first: a tensor that is read may lie in one that is also called, which then is a copy already.
    for node in owned.graph.nodes:
        if node.op == "call_module" and node.target not in copied:
            copied.add(node.target)
            module = owned.get_submodule(node.target)
            if not isinstance(module, FusedModule):
                owned.set_submodule(node.target, copy.deepcopy(module, memo))
    for target in dict.fromkeys(node.target for node in owned.graph.nodes if node.op == "get_attr"):
        value = attribute_of(owned, target)
        if not isinstance(value, Tensor):
            continue
        parent_path, _, name = target.rpartition(".")
        parent = owned.get_submodule(parent_path)
        clone = clones.setdefault(id(value), value.detach().clone())
        delattr(parent, name)
        parent.register_buffer(name, clone)
    for parameter in owned.parameters():
        parameter.requires_grad_(False)
    return owned.eval()


# Called on a constant these would change the model's own parameter.
_IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv}


def fold_constants(plan: fx.GraphModule) -> None:
    """Evaluate once what depends on parameters alone: views and products of them."""
    for node in list(plan.graph.nodes):
        inputs = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not inputs or node.target in _IN_PLACE:
            continue
        if isinstance(node.target, str) and node.target.endswith("_"):
            continue
        if not all(constant_of(value) is not None for value in inputs):
            continue
        arguments = fx.map_arg(node.args, constant_of)
        keywords = fx.map_arg(node.kwargs, constant_of)
        with torch.no_grad():
            if node.op == "call_method":
                result = getattr(arguments[0], node.target)(*arguments[1:], **keywords)
            else:
                result = node.target(*arguments, **keywords)
        if not isinstance(result, Tensor):
            continue
        name = free_name(plan, "constant", prefix="")
        plan.register_buffer(name, result.detach().clone())
        with plan.graph.inserting_before(node):
            constant = plan.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        plan.graph.erase_node(node)
    plan.graph.eliminate_dead_code()


def in_place_input(node: fx.Node) -> fx.Node | None:
    """The value that a node overwrites, or None."""
    overwrites = node.target in _IN_PLACE or (
        isinstance(node.target, str) and node.op == "call_method" and node.target.endswith("_")
    )
    if node.op == "call_module":
        overwrites = bool(getattr(module_of(node), "inplace", False))
    if node.op == "call_function" and node.kwargs.get("inplace", False):
        overwrites = True
    first = node.args[0] if overwrites and node.args else None
    return first if isinstance(first, fx.Node) else None


def redirect_in_place(plan: fx.GraphModule) -> None:
    """Make later readers of an overwritten value read the result instead, so that graph edges tell the whole
    truth.
    """
    order = {node: index for index, node in enumerate(plan.graph.nodes)}
    for node in plan.graph.nodes:
        overwritten = in_place_input(node)
        if overwritten is None:
            continue
        for user in list(overwritten.users):
            if order[user] > order[node]:
                user.replace_input_with(overwritten, node)
