"""Passes that put several operations of a plan together into one launch, where our kernels run.

They follow the pass that makes the fused modules, and look for runs of these: expand, depthwise, project; depthwise and
1x1; linear and linear; pool and classifier. Not on a CPU, as oneDNN has no operators for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.elements import layer_norm, permutation
from depthfuse.acceleration.planning.graph import insert_fused, mark_value, module_of
from depthfuse.fused.blocks import (
    FusedDepthwisePointwise,
    FusedInvertedResidual,
    FusedMlp,
    FusedPoolLinear,
)
from depthfuse.fused.layers import FusedConv2d, FusedLinear, FusedModule


def _module(node: object, kind: type) -> nn.Module | None:
    """The module of type `kind` that a node calls, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = module_of(node)
    return module if isinstance(module, kind) else None


def _reader(node: fx.Node) -> fx.Node | None:
    """The only reader of a node's value, where it reads it as its first argument; None otherwise."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return (
        user if user.args and user.args[0] is node and list(user.all_input_nodes).count(node) == 1 else None
    )


def _is_bare(node: fx.Node, module: FusedConv2d | FusedLinear) -> bool:
    """Whether nothing but bias and activation follow the product: no residual, no affine."""
    return len(node.args) == 1 and module.scale is None and module.shift is None


def _is_pointwise(module: FusedConv2d) -> bool:
    geometry = (*module.weight.shape[2:], *module.stride, module.groups)
    return geometry == (1, 1, 1, 1, 1) and not any(module.padding) and module.norm_eps is None


def _is_depthwise(module: FusedConv2d) -> bool:
    return module.weight.shape[:2] == (module.groups, 1) and module.groups > 1 and module.norm_eps is None


def _replace(
    plan: fx.GraphModule, nodes: Sequence[fx.Node], module: FusedModule, args: tuple[fx.Node, ...]
) -> None:
    """Put one call of `module` where the last of `nodes` was; the others have no other readers."""
    end = nodes[-1]
    with plan.graph.inserting_before(end):
        result = insert_fused(plan, module, args, nodes)
    mark_value(result, end)
    end.replace_all_uses_with(result)
    for node in reversed(nodes):
        plan.graph.erase_node(node)


def fuse_inverted_residuals(plan: fx.GraphModule, backend: str) -> None:
    """Expand 1x1, depthwise, project 1x1 -> FusedInvertedResidual, where the kernel takes them."""
    from depthfuse.kernels.inverted_residual import supports

    for expand in list(plan.graph.nodes):
        first = _module(expand, FusedConv2d)
        if first is None or not (_is_bare(expand, first) and _is_pointwise(first)) or first.bias is None:
            continue
        filtering = _reader(expand)
        second = _module(filtering, FusedConv2d)
        if second is None or not (_is_bare(filtering, second) and _is_depthwise(second)):
            continue
        project = _reader(filtering)
        third = _module(project, FusedConv2d)
        if third is None or not _is_pointwise(third) or second.bias is None or first.act != second.act:
            continue
        r, s = second.weight.shape[2:]
        square = r == s and second.padding == [r // 2, r // 2] and second.dilation == [1, 1]
        stride = second.stride[0]
        channels, outputs = first.weight.shape[1], third.weight.shape[0]
        if not square or second.stride != [stride, stride] or not supports(channels, outputs, r, stride):
            continue
        tensors = (first.weight, first.bias, second.weight, second.bias, third.weight, third.bias)
        config = {"stride": stride, "act_inner": first.act, "act": third.act, "backend": backend}
        module = FusedInvertedResidual(*tensors, third.scale, third.shift, **config)
        args = (expand.args[0], *project.args[1:])
        _replace(plan, (expand, filtering, project), module, args)


def fuse_depthwise_pointwise(plan: fx.GraphModule, backend: str) -> None:
    """Depthwise, 1x1 -> FusedDepthwisePointwise, where the kernel takes them."""
    from depthfuse.kernels.depthwise_pointwise import supports

    for filtering in list(plan.graph.nodes):
        first = _module(filtering, FusedConv2d)
        if first is None or not (_is_bare(filtering, first) and _is_depthwise(first)):
            continue
        project = _reader(filtering)
        second = _module(project, FusedConv2d)
        if second is None or not _is_pointwise(second) or not supports(second.weight.shape[0]):
            continue
        tensors = (first.weight, first.bias, second.weight, second.bias, second.scale, second.shift)
        geometry: dict[str, Any] = {
            "stride": first.stride,
            "padding": first.padding,
            "dilation": first.dilation,
        }
        config = {"act_inner": first.act, "act": second.act, "backend": backend}
        module = FusedDepthwisePointwise(*tensors, **geometry, **config)
        _replace(plan, (filtering, project), module, (filtering.args[0], *project.args[1:]))


def fuse_mlps(plan: fx.GraphModule, backend: str) -> None:
    """Linear, linear -> FusedMlp, where the kernel takes them."""
    from depthfuse.kernels.mlp import supports

    for expand in list(plan.graph.nodes):
        first = _module(expand, FusedLinear)
        if first is None or not _is_bare(expand, first):
            continue
        project = _reader(expand)
        second = _module(project, FusedLinear)
        if second is None or second.norm_eps is not None:
            continue
        if not supports(first.weight.shape[1], second.weight.shape[0], first.weight.dtype):
            continue
        tensors = (first.weight, first.bias, second.weight, second.bias, second.scale, second.shift)
        config = {"act_inner": first.act, "act": second.act, "norm_eps": first.norm_eps, "backend": backend}
        _replace(plan, (expand, project), FusedMlp(*tensors, **config), (expand.args[0], *project.args[1:]))


def fuse_classifiers(plan: fx.GraphModule, backend: str) -> None:
    """Global average pool, LayerNorm, flatten, linear -> FusedPoolLinear."""
    for pool in list(plan.graph.nodes):
        if not _is_global_average(pool):
            continue
        nodes, norm, node, axis = [pool], None, _reader(pool), 1  # axis: of the channels
        while node is not None and _module(node, FusedLinear) is None:
            found, order = layer_norm(node), permutation(node)
            last = len(aten.shape_of(nodes[-1]) or ()) - 1
            if order is not None:
                axis = order.index(axis)
            elif found is not None and norm is None and axis == last:
                norm = found
            elif _drops_ones(nodes[-1], node):
                axis = 1
            else:
                break
            nodes.append(node)
            node = _reader(node)
        layer = _module(node, FusedLinear)
        if layer is None or not _is_bare(node, layer) or layer.act != "none" or layer.norm_eps is not None:
            continue
        if len(aten.shape_of(node.args[0]) or ()) != 2 or aten.dtype_of(pool.args[0]) != layer.weight.dtype:
            continue
        dtype = layer.weight.dtype
        weight, bias = layer.weight.double(), layer.bias
        if norm is not None:
            if norm.bias is not None:
                shift = (weight @ norm.bias).to(dtype)
                bias = shift if bias is None else (bias.double() + shift).to(dtype)
            weight = weight if norm.weight is None else weight * norm.weight
        eps = None if norm is None else norm.eps
        module = FusedPoolLinear(weight.to(dtype), bias, norm_eps=eps, backend=backend)
        _replace(plan, (*nodes, node), module, (pool.args[0],))


def _is_global_average(node: fx.Node) -> bool:
    """Whether a node averages images [N, C, H, W] over their pixels."""
    name = aten.name_of(node)
    if name not in ("adaptive_avg_pool2d", "mean") or len(aten.shape_of(node.args[0]) or ()) != 4:
        return False
    given = aten.arguments(node)
    if name == "adaptive_avg_pool2d":
        return list(given["output_size"]) == [1, 1]
    return sorted(d % 4 for d in given.get("dim") or ()) == [2, 3] and given["dtype"] is None


def _drops_ones(before: fx.Node, node: fx.Node) -> bool:
    """Whether a node makes [N, C] of [N, C, 1, 1] or [N, 1, 1, C]."""
    if aten.name_of(node) not in ("flatten", "reshape", "squeeze"):
        return False
    old, new = aten.shape_of(before), aten.shape_of(node)
    return old is not None and new is not None and len(new) == 2 and [n for n in old if n != 1] == list(new)


# In this order: a depthwise convolution belongs to an inverted residual before it does to a pair.
KERNEL_PASSES = (fuse_inverted_residuals, fuse_depthwise_pointwise, fuse_mlps, fuse_classifiers)
