"""Write timm's layers as PyTorch's: what comes after tracing then knows one kind of each.

BatchNormAct2d              batch norm, activation
LayerNorm, LayerNorm2d      layer norm (over the last axis, between two permutations for the second)
Conv2dSame, *Pool2dSame     padding that depends on the image's size, the layer without padding
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.layers
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import fx, nn

from depthfuse.acceleration.planning.graph import free_name, module_of
from depthfuse.merging.tracing import has_hooks

# (plan, node, its module) -> the node that now has its value, or None where it stays
_Rule = Callable[[fx.GraphModule, fx.Node, Any], fx.Node | None]


def canonicalise(plan: fx.GraphModule) -> None:
    """Rewrite the calls of timm's layers in place; the new layers share their tensors. Those with hooks stay."""
    for node in list(plan.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        module = module_of(node)
        rule = _RULES.get(type(module))
        if rule is None or has_hooks(module):
            continue
        with plan.graph.inserting_before(node):
            value = rule(plan, node, module)
        if value is not None:
            node.replace_all_uses_with(value)
            plan.graph.erase_node(node)


def _call(plan: fx.GraphModule, layer: nn.Module, value: fx.Node, path: str) -> fx.Node:
    """A call of `layer` that goes by `path` in the report."""
    name = free_name(plan, path, prefix="plain_")
    plan.add_submodule(name, layer.eval())
    node = plan.graph.call_module(name, (value,))
    node.meta["path"] = path
    return node


def _norm_act(plan: fx.GraphModule, node: fx.Node, module: timm.layers.BatchNormAct2d) -> fx.Node | None:
    if not isinstance(module.drop, nn.Identity):
        return None
    norm = nn.BatchNorm2d(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )
    norm._parameters, norm._buffers = dict(module._parameters), dict(module._buffers)
    value = _call(plan, norm, node.args[0], node.target)
    return _call(plan, module.act, value, f"{node.target}.act")


def _layer_norm(plan: fx.GraphModule, node: fx.Node, module: nn.LayerNorm) -> fx.Node | None:
    if getattr(module, "_fast_norm", False):
        return None
    norm = nn.LayerNorm(
        module.normalized_shape,
        module.eps,
        module.elementwise_affine,
        bias=module.bias is not None,
        device="meta",
    )
    norm._parameters = dict(module._parameters)
    value = node.args[0]
    if type(module) is timm.layers.LayerNorm:
        return _call(plan, norm, value, node.target)
    value = plan.graph.call_method("permute", (value, 0, 2, 3, 1))
    value = _call(plan, norm, value, node.target)
    return plan.graph.call_method("permute", (value, 0, 3, 1, 2))


def _padded(plan: fx.GraphModule, node: fx.Node, layer: nn.Module, fill: float) -> fx.Node:
    """`layer`, which does not pad, behind the padding of TensorFlow's "SAME"."""
    sizes = (layer.kernel_size, layer.stride, getattr(layer, "dilation", (1, 1)))
    value = plan.graph.call_function(pad_same, (node.args[0], *sizes, fill))
    value.meta["path"] = f"{node.target}:pad_same"
    return _call(plan, layer, value, node.target)


def _conv_same(plan: fx.GraphModule, node: fx.Node, module: Conv2dSame) -> fx.Node:
    conv = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
        device="meta",
    )
    conv._parameters = dict(module._parameters)
    return _padded(plan, node, conv, 0.0)


def _max_pool_same(plan: fx.GraphModule, node: fx.Node, module: MaxPool2dSame) -> fx.Node:
    sizes = (module.kernel_size, module.stride)
    return _padded(
        plan,
        node,
        nn.MaxPool2d(*sizes, dilation=module.dilation, ceil_mode=module.ceil_mode),
        -float("inf"),
    )


def _avg_pool_same(plan: fx.GraphModule, node: fx.Node, module: AvgPool2dSame) -> fx.Node:
    sizes = (module.kernel_size, module.stride)
    pool = nn.AvgPool2d(*sizes, ceil_mode=module.ceil_mode, count_include_pad=module.count_include_pad)
    return _padded(plan, node, pool, 0.0)


_RULES: dict[type[nn.Module], _Rule] = {
    timm.layers.BatchNormAct2d: _norm_act,
    timm.layers.LayerNorm: _layer_norm,
    timm.layers.LayerNorm2d: _layer_norm,
    Conv2dSame: _conv_same,
    MaxPool2dSame: _max_pool_same,
    AvgPool2dSame: _avg_pool_same,
}
