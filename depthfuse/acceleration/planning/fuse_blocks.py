"""Passes that put several operations of a plan together into one launch, where our kernels run.

They follow the pass that makes the fused modules, and look for runs of these: expand, depthwise, project; depthwise and
1x1; linear and linear; attention between its projections; pool and classifier. On a CPU only for attention, as oneDNN
has no operators for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from torch import fx, nn

from depthfuse.acceleration.planning.elements import layer_norm
from depthfuse.acceleration.planning.graph import insert_fused, mark_value, module_of
from depthfuse.fused.blocks import (
    FusedAttention,
    FusedDepthwisePointwise,
    FusedInvertedResidual,
    FusedMlp,
    FusedPoolLinear,
)
from depthfuse.fused.layers import FusedConv2d, FusedLinear, FusedModule
from depthfuse.merging.tracing import has_hooks


def _module(node: object, kind: type) -> nn.Module | None:
    """The module of type `kind` that a node calls, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = module_of(node)
    return module if isinstance(module, kind) and not has_hooks(module) else None


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


def fuse_inverted_residuals(plan: fx.GraphModule, dtype: torch.dtype, backend: str) -> None:
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


def fuse_depthwise_pointwise(plan: fx.GraphModule, dtype: torch.dtype, backend: str) -> None:
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


def fuse_mlps(plan: fx.GraphModule, dtype: torch.dtype, backend: str) -> None:
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
        if not supports(first.weight.shape[1], second.weight.shape[0], dtype):
            continue
        tensors = (first.weight, first.bias, second.weight, second.bias, second.scale, second.shift)
        config = {"act_inner": first.act, "act": second.act, "norm_eps": first.norm_eps, "backend": backend}
        _replace(plan, (expand, project), FusedMlp(*tensors, **config), (expand.args[0], *project.args[1:]))


def fuse_attention(plan: fx.GraphModule, dtype: torch.dtype, backend: str) -> None:
    """qkv split into heads, scaled_dot_product_attention, heads joined -> FusedAttention."""
    for attend in list(plan.graph.nodes):
        if attend.target is not F.scaled_dot_product_attention or len(attend.args) != 3:
            continue
        options = dict(attend.kwargs)
        scale = options.pop("scale", None)
        unusual = (
            any(options.pop(name, usual) != usual for name, usual in _PLAIN_ATTENTION.items()) or options
        )
        before = _split_heads(attend)
        after = _joined_heads(attend)
        if unusual or before is None or after is None:
            continue
        qkv, heads, head_dim = before[0].args[0], *before[0].args[4:]
        if qkv.meta.get("shape", ())[2:] != (3 * heads * head_dim,):
            continue
        like = next(iter([*plan.parameters(), *plan.buffers()])).new_empty(0, dtype=dtype)
        module = FusedAttention(like, heads=heads, scale=scale, backend=backend)
        _replace(plan, (*before, attend, *after), module, (qkv,))


_PLAIN_ATTENTION = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}


def _split_heads(attend: fx.Node) -> list[fx.Node] | None:
    """reshape(B, N, 3, H, D) of qkv, permute(2, 0, 3, 1, 4), unbind(0), and its three parts, which `attend` reads."""
    parts: list[Any] = list(attend.args)
    for index, part in enumerate(parts):
        is_item = isinstance(part, fx.Node) and getattr(part.target, "__name__", "") == "getitem"
        if not is_item or part.args[1] != index or _reader_of_part(part) is not attend:
            return None
    unbind = parts[0].args[0]
    if any(part.args[0] is not unbind for part in parts) or len(unbind.users) != 3:
        return None
    if unbind.target != "unbind" or unbind.args[1:] not in ((0,), ()):
        return None
    permute = unbind.args[0]
    if permute.target != "permute" or tuple(permute.args[1:]) != (2, 0, 3, 1, 4) or len(permute.users) != 1:
        return None
    reshape = permute.args[0]
    if reshape.target not in ("reshape", "view") or len(reshape.args) != 6 or reshape.args[3] != 3:
        return None
    if not all(isinstance(n, int) for n in reshape.args[4:]) or len(reshape.users) != 1:
        return None
    return [reshape, permute, unbind, *parts]


def _reader_of_part(part: fx.Node) -> fx.Node | None:
    return next(iter(part.users)) if len(part.users) == 1 else None


def _joined_heads(attend: fx.Node) -> list[fx.Node] | None:
    """transpose(1, 2) and reshape(B, N, H * D), which read what `attend` gives."""
    transpose = _reader(attend)
    if transpose is None or transpose.target != "transpose" or tuple(transpose.args[1:]) != (1, 2):
        return None
    reshape = _reader(transpose)
    if reshape is None or reshape.target not in ("reshape", "view") or len(reshape.args) != 4:
        return None
    return [transpose, reshape]


def fuse_classifiers(plan: fx.GraphModule, dtype: torch.dtype, backend: str) -> None:
    """Global average pool, LayerNorm, flatten, linear -> FusedPoolLinear."""
    for pool in list(plan.graph.nodes):
        if pool.op != "call_module" or not _is_global_average(module_of(pool)) or len(pool.args) != 1:
            continue
        if len(pool.args[0].meta.get("shape", ())) != 4:
            continue
        nodes, norm, node, axis = [pool], None, _reader(pool), -3  # axis: of the channels
        while node is not None and _module(node, FusedLinear) is None:
            found = layer_norm(module_of(node)) if node.op == "call_module" else None
            order = tuple(node.args[1:]) if node.target == "permute" else None
            if (order, axis) in (((0, 2, 3, 1), -3), ((0, 3, 1, 2), -1)):
                axis = -1 if axis == -3 else -3
            elif found is not None and norm is None and axis == -1:
                norm = found
            elif not (_flattens(node) and axis == -3):
                break
            nodes.append(node)
            node = _reader(node)
        layer = _module(node, FusedLinear)
        if layer is None or not _is_bare(node, layer) or layer.act != "none" or layer.norm_eps is not None:
            continue
        if len(node.args[0].meta.get("shape", ())) != 2:
            continue
        weight, bias = layer.weight.double(), layer.bias
        if norm is not None:
            if norm.bias is not None:
                shift = (weight @ norm.bias).to(dtype)
                bias = shift if bias is None else (bias.double() + shift).to(dtype)
            weight = weight if norm.weight is None else weight * norm.weight
        eps = None if norm is None else norm.eps
        module = FusedPoolLinear(weight.to(dtype), bias, norm_eps=eps, backend=backend)
        _replace(plan, (*nodes, node), module, (pool.args[0],))


def _is_global_average(module: nn.Module) -> bool:
    if type(module) is nn.AdaptiveAvgPool2d:
        return module.output_size in (1, (1, 1))
    return type(module) is FastAdaptiveAvgPool and tuple(module.dim) == (2, 3)


def _flattens(node: fx.Node) -> bool:
    """Whether a node drops axes of size 1 behind the channels."""
    if node.op == "call_module":
        module = module_of(node)
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    return node.target in ("flatten", torch.flatten) and node.args[1:] == (1,) and not node.kwargs


# In this order: a depthwise convolution belongs to an inverted residual before it does to a pair.
KERNEL_PASSES = (fuse_inverted_residuals, fuse_depthwise_pointwise, fuse_mlps, fuse_classifiers)
