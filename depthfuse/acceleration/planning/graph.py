"""Small questions to ask and changes to make on the graph of a program or a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning import aten
from depthfuse.fused.layers import FusedModule


class PlanGraph(fx.GraphModule):
    """A graph that is pickled as its nodes. torch.fx pickles Python code, and traces that when it is loaded: operators
    that are given a list with a size in it do not take what stands for the size then.
    """

    def __reduce__(self):
        held = nn.Module()
        held.__dict__.update({key: self.__dict__[key] for key in vars(held)})
        nodes = [
            (node.op, node.name, _named(node.target), *fx.map_arg((node.args, node.kwargs), _named))
            for node in self.graph.nodes
        ]
        return _unpickled, (held, nodes)


@dataclass(frozen=True)
class _Named:
    """What stands for a node, or for an operator of PyTorch's, which pickle does not take."""

    kind: str
    name: str
    overload: str = ""


def _named(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _Named("node", value.name)
    if isinstance(value, torch._ops.OpOverload):
        namespace, _, name = value._schema.name.partition("::")
        return _Named(namespace, name, value._overloadname)
    if isinstance(value, torch._ops.HigherOrderOperator):
        return _Named("higher_order", value.name())
    return value


def _unpickled(held: nn.Module, nodes: list[tuple]) -> PlanGraph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def found(value: Any) -> Any:
        if not isinstance(value, _Named):
            return value
        if value.kind == "node":
            return made[value.name]
        operator = getattr(getattr(torch.ops, value.kind), value.name)
        return getattr(operator, value.overload) if value.overload else operator

    for op, name, target, args, kwargs in nodes:
        args, kwargs = fx.node.map_aggregate((args, kwargs), found)
        made[name] = graph.create_node(op, found(target), args, kwargs, name)
    return PlanGraph(held, graph, "Plan")


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
    """The tensor that a get_attr node reads, or None for anything else. Where the plan has fewer digits than the model,
    it is the model's own.
    """
    if isinstance(node, fx.Node) and node.op == "get_attr":
        value = node.meta.get("exact")
        if value is None:
            value = attribute_of(node.graph.owning_module, node.target)
        return value.detach() if isinstance(value, Tensor) else None
    return None


def path_of(node: fx.Node) -> str:
    """The path of the module that the node's work came from, for the report; "" for the model itself."""
    return node.meta.get("path", "")


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
    """What a node of a plan stands for: nodes of the program, by name, the last one last, and their paths."""

    nodes: tuple[str, ...]
    paths: tuple[str, ...]


def origin_of(node: fx.Node) -> Origin:
    """The origin of a fused module's call, or of a node that is left as it was."""
    return node.meta.get("origin") or Origin((value_name(node),), (path_of(node),))


def value_name(node: fx.Node) -> str:
    """The name of the node of the program whose value this node has."""
    return node.meta.get("value_of", node.name)


def mark_value(node: fx.Node, original: fx.Node) -> None:
    """Write down that `node` has the value that `original` had, and its shape and dtype."""
    node.meta["value_of"] = value_name(original)
    if "val" in original.meta:
        node.meta["val"] = original.meta["val"]


def new_call(graph: fx.Graph, target: torch._ops.OpOverload, args: tuple, like: fx.Node) -> fx.Node:
    """A call of an operator at the insertion point, which gives what `like` gives."""
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("path", "val") if key in like.meta}
    return node


def insert_fused(
    plan: fx.GraphModule, module: FusedModule, args: tuple[fx.Node, ...], nodes: Sequence[fx.Node]
) -> fx.Node:
    """A call of `module`, at the graph's insertion point, that stands for `nodes`, in the order that they ran."""
    name = free_name(plan, path_of(nodes[0]) or type(module).__name__, prefix="fused_")
    plan.add_submodule(name, module)
    call = plan.graph.call_module(name, args)
    origins = [origin_of(node) for node in nodes]
    call.meta["origin"] = Origin(
        tuple(name for origin in origins for name in origin.nodes),
        tuple(path for origin in origins for path in origin.paths),
    )
    return call


def own_tensors(plan: fx.GraphModule) -> fx.GraphModule:
    """The plan with only what it reads and calls, and copies of the tensors: nothing is shared with the model."""
    owned = PlanGraph(plan, plan.graph, type(plan).__name__)
    clones: dict[int, Tensor] = {}
    for target in dict.fromkeys(node.target for node in owned.graph.nodes if node.op == "get_attr"):
        value = attribute_of(owned, target)
        if not isinstance(value, Tensor):
            continue
        parent_path, _, name = target.rpartition(".")
        parent = owned.get_submodule(parent_path)
        clone = clones.setdefault(id(value), value.detach().clone())
        delattr(parent, name)
        parent.register_buffer(name, clone)
    return owned.eval()


def all_numbers_known(node: fx.Node) -> bool:
    """Whether none of a node's arguments is computed from sizes."""
    return not any(aten.is_number(other) for other in node.all_input_nodes)
