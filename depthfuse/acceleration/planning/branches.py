"""Sums of convolutions of one value are one convolution: the branches that RepVGG, MobileOne and their kin train with.

Each branch is a convolution with or without a batch norm, or a batch norm alone. They are added in float64
(`depthfuse.merging.algebra`), where that takes no more multiplications than they took apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.elements import batch_norm
from depthfuse.acceleration.planning.graph import attribute_of, constant_of, free_name, new_call
from depthfuse.merging.algebra import LinearConv, add

_CONV = torch.ops.aten.conv2d.default


@dataclass(frozen=True)
class _Branch:
    source: fx.Node
    conv: LinearConv
    weight: fx.Node | None  # of its convolution; None for a batch norm alone

    @property
    def products(self) -> int:
        """Multiplications for each output pixel."""
        return self.conv.weight.numel()


@torch.no_grad()
def merge_branches(node: fx.Node) -> fx.Node | None:
    """One convolution in the place of a sum of two, or None where there is none."""
    if aten.name_of(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    a, b = (_branch(value, node) for value in node.args)
    if a is None or b is None or a.source is not b.source:
        return None
    weight = a.weight or b.weight
    if weight is None:
        return None
    larger, smaller = sorted((a, b), key=lambda branch: branch.conv.weight.shape[2:].numel(), reverse=True)
    try:
        merged = add(larger.conv, smaller.conv)
    except ValueError:  # strides or padding that no one kernel has
        return None
    if merged.weight.numel() > a.products + b.products:
        return None
    tensors = [_constant(node, weight, tensor) for tensor in (merged.weight, merged.bias)]
    geometry = (list(merged.stride), list(merged.padding), list(merged.dilation), merged.groups)
    return new_call(node.graph, _CONV, (a.source, *tensors, *geometry), node)


def _branch(value: object, total: fx.Node) -> _Branch | None:
    """What a summand computes of one value, where nobody else reads it."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return None
    shape, sizes = aten.shape_of(value), aten.shape_of(total)
    if len(shape or ()) != 4 or shape != sizes or aten.dtype_of(value) != aten.dtype_of(total):
        return None
    affine = batch_norm(value)
    inner = value if affine is None else value.args[0]
    conv = None if affine is not None and len(inner.users) != 1 else _convolution(inner)
    if conv is not None:
        source, linear, weight = conv
        return _Branch(source, linear if affine is None else linear.scaled(*affine), weight)
    if affine is None:
        return None
    scale, shift = affine
    return _Branch(inner, LinearConv(scale.reshape(-1, 1, 1, 1), shift, groups=len(scale)), None)


def _convolution(node: fx.Node) -> tuple[fx.Node, LinearConv, fx.Node] | None:
    """(what it reads, what it computes, its weight) of a convolution with constant weights."""
    if aten.name_of(node) != "conv2d" or node.target is not _CONV:
        return None
    given = aten.arguments(node)
    weight, bias = constant_of(given["weight"]), constant_of(given["bias"])
    pairs = [_pair(given[name]) for name in ("stride", "padding", "dilation")]
    known = all(isinstance(n, int) for pair in pairs for n in pair)
    if weight is None or (bias is None and given["bias"] is not None) or not known or not weight.numel():
        return None
    shift = weight.new_zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    return (
        given["input"],
        LinearConv(weight.double(), shift, *pairs, groups=given["groups"]),
        given["weight"],
    )


def _pair(value: list[int] | int) -> tuple[int, int]:
    found = [value] if isinstance(value, int) else list(value)
    first, second = found * 2 if len(found) == 1 else found
    return first, second


def _constant(node: fx.Node, like: fx.Node, exact: Tensor) -> fx.Node:
    """A new constant of the program in the dtype of `like`."""
    program = node.graph.owning_module
    dtype = attribute_of(program, like.target).dtype
    name = free_name(program, "constant", prefix="")
    program.register_buffer(name, exact.to(dtype))
    constant = node.graph.get_attr(name)
    constant.meta = {**like.meta, "val": like.meta["val"].new_empty(exact.shape)}
    if "exact" in like.meta:  # the program has fewer digits than the model
        constant.meta["exact"] = exact
    return constant
