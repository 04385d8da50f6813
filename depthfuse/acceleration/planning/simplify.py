"""Write a program in fewer words, so that what comes after knows one form of each thing.

Nothing that these rules change can be seen from outside: they take away what computes nothing, and write the many ways
to say linear layer, padding, norm and SiLU as one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.branches import merge_branches
from depthfuse.acceleration.planning.elements import permutation
from depthfuse.acceleration.planning.graph import (
    all_numbers_known,
    attribute_of,
    constant_of,
    free_name,
    mark_value,
    new_call,
)

ATEN = torch.ops.aten


def simplify(program: fx.GraphModule) -> None:
    """Apply all rules, in place. Names of nodes that stay are kept."""
    for rule in _RULES:
        for node in list(program.graph.nodes):
            if node.op == "call_function" and (node.users or aten.writes(node)):
                with program.graph.inserting_before(node):
                    value = rule(node)
                if value is not None and value is not node:
                    if value.op == "call_function" and value is not node.args[0]:
                        mark_value(value, node)
                    node.replace_all_uses_with(value)
                    program.graph.erase_node(node)
        program.graph.eliminate_dead_code()
        if rule is _no_op:
            fold_constants(program)


def _no_op(node: fx.Node) -> fx.Node | None:
    """The input of a node that hands it on, as it is or in another memory layout."""
    name = aten.name_of(node)
    source = node.args[0] if node.args else None
    before, after = aten.value_of(source), aten.value_of(node)
    if before is None or after is None or not isinstance(source, fx.Node):
        return None
    if (before.dtype, before.device, before.layout) != (after.dtype, after.device, after.layout):
        return None
    if before.is_conj() != after.is_conj():
        return None
    if aten.is_idle_dropout(node):
        return source
    if name in ("detach", "alias", "lift_fresh", "to", "type_as", "contiguous", "positive"):
        return source
    adds_nothing = name == "add" and any(type(n) in (int, float) and n == 0 for n in node.args[1:2])
    if name in ("clone", "lift_fresh_copy", "_to_copy") or adds_nothing:
        # What the model copied for its caller is not to be the caller's own tensor, nor one of ours.
        return None if _is_ours_or_the_callers(source) and _is_given_back(node) else source
    if aten.shape_of(source) != aten.shape_of(node):
        return None
    if name in ("pad", "constant_pad_nd"):
        pads = aten.arguments(node)["pad"]
        return source if all(type(n) is int and n == 0 for n in pads) else None
    if name == "slice":
        given = aten.arguments(node)
        return source if given["start"] in (0, None) and given["step"] == 1 else None
    if name in ("view", "reshape", "_unsafe_view", "expand", "expand_as", "flatten", "unflatten", "view_as"):
        return source
    order = permutation(node)
    return source if order is not None and order == tuple(range(len(order))) else None


def _is_ours_or_the_callers(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") or not aten.is_fresh(node)


def _is_given_back(node: fx.Node) -> bool:
    return any(user.op == "output" or not aten.is_fresh(user) for user in node.users)


def _size(node: fx.Node) -> fx.Node | None:
    """Sizes are asked of the earliest value that has them: whoever asks counts as a reader."""
    if aten.name_of(node) != "sym_size":
        return None
    value, axis = node.args
    while aten.name_of(value) and isinstance(value.args[0], fx.Node):
        before, after = aten.shape_of(value.args[0]), aten.shape_of(value)
        if before is None or after is None or len(before) != len(after) or before[axis] != after[axis]:
            break
        value = value.args[0]
    node.args = (value, axis)
    return None


def _norm(node: fx.Node) -> fx.Node | None:
    """Norms that also give their statistics, which nobody reads."""
    found = aten.item_of(node)
    if found is None or found[1] != 0:
        return None
    native = found[0]
    if any(aten.item_of(user) is None or user.args[1] != 0 for user in native.users):
        return None
    name = aten.name_of(native)
    if name == "_native_batch_norm_legit_no_training":
        x, weight, bias, mean, variance, momentum, eps = native.args
        args = (x, weight, bias, mean, variance, False, momentum, eps, False)
        return new_call(node.graph, ATEN.batch_norm.default, args, node)
    if name == "native_layer_norm":
        return new_call(node.graph, ATEN.layer_norm.default, (*native.args, False), node)
    return None


def _linear(node: fx.Node) -> fx.Node | None:
    """Products with a constant matrix, which is the second factor."""
    name = aten.name_of(node)
    if name == "addmm":
        given = aten.arguments(node)
        bias, x, matrix = given["self"], given["mat1"], given["mat2"]
        if given["beta"] != 1 or given["alpha"] != 1 or constant_of(bias) is None:
            return None
        if len(aten.shape_of(bias) or ()) != 1:
            return None
    elif name in ("mm", "matmul"):
        (x, matrix), bias = node.args, None
    else:
        return None
    constant = constant_of(matrix)
    if constant is None or constant.dim() != 2 or len(aten.shape_of(x) or ()) < 2:
        return None
    weight = _new_constant(matrix, lambda tensor: tensor.t())
    return new_call(node.graph, ATEN.linear.default, (x, weight, bias), node)


def _new_constant(node: fx.Node, change: Callable[[Tensor], Tensor]) -> fx.Node:
    """A constant that is computed from another one."""
    plan = node.graph.owning_module
    name = free_name(plan, "constant", prefix="")
    plan.register_buffer(name, change(attribute_of(plan, node.target).detach()).clone())
    constant = node.graph.get_attr(name)
    constant.meta = {**node.meta, "val": change(node.meta["val"])}
    if "exact" in node.meta:
        constant.meta["exact"] = change(node.meta["exact"].detach())
    return constant


def _convolution(node: fx.Node) -> fx.Node | None:
    """Two-dimensional convolutions in their general form, and with their padding in words."""
    name = aten.name_of(node)
    if name == "convolution":
        given = aten.arguments(node)
        if given["transposed"] or len(aten.shape_of(node) or ()) != 4:
            return None
        keys = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        return new_call(node.graph, ATEN.conv2d.default, tuple(given[key] for key in keys), node)
    if name != "conv2d" or node.target._overloadname != "padding":
        return None
    given = aten.arguments(node)
    kernel = (aten.shape_of(given["weight"]) or ())[2:]
    reach = [(size - 1) * step for size, step in zip(kernel, _pair(given["dilation"]), strict=True)]
    if given["padding"] == "valid":
        padding = [0, 0]
    elif all(n % 2 == 0 for n in reach):
        padding = [n // 2 for n in reach]
    else:
        return None
    args = (given["input"], given["weight"], given["bias"], given["stride"], padding)
    return new_call(node.graph, ATEN.conv2d.default, (*args, given["dilation"], given["groups"]), node)


def _pair(value: list[int] | int) -> list[int]:
    found = [value] if isinstance(value, int) else list(value)
    return found * 2 if len(found) == 1 else found


def _silu(node: fx.Node) -> fx.Node | None:
    """x * sigmoid(x)."""
    if aten.name_of(node) != "mul" or len(node.args) != 2:
        return None
    for x, gate in (node.args, node.args[::-1]):
        if aten.name_of(gate) == "sigmoid" and gate.args[0] is x and len(gate.users) == 1:
            return new_call(node.graph, ATEN.silu.default, (x,), node)
    return None


_RULES: tuple[Callable[[fx.Node], fx.Node | None], ...] = (
    _norm,
    _no_op,
    _size,
    _convolution,
    _linear,
    _silu,
    merge_branches,
)


def fold_constants(program: fx.GraphModule) -> None:
    """Evaluate once what depends on parameters and numbers alone."""
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        inputs = node.all_input_nodes
        if aten.writes(node) or aten.is_random(node) or not all_numbers_known(node):
            continue
        if aten.value_of(node) is None or any(constant_of(value) is None for value in inputs):
            continue
        if any(not isinstance(size, int) for size in aten.shape_of(node) or ()):
            continue
        if node.meta["val"].numel() > 2**20 + 4 * sum(v.meta["val"].numel() for v in inputs):
            continue  # it is cheaper to compute than to keep
        read = lambda value: attribute_of(program, value.target).detach()  # noqa: E731
        with torch.no_grad():
            result = node.target(*fx.map_arg(node.args, read), **fx.map_arg(node.kwargs, read))
        name = free_name(program, "constant", prefix="")
        program.register_buffer(name, result.detach().clone())
        with program.graph.inserting_before(node):
            constant = program.graph.get_attr(name)
        constant.meta = {key: value for key, value in node.meta.items() if key != "exact"}
        node.replace_all_uses_with(constant)
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
