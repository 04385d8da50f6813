"""PyTorch's operators as they stand in a program: their names, their arguments by name, and what they leave alone."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


def name_of(node: object) -> str:
    """The operator's name without its overload ("conv2d"), "" for what calls no operator of PyTorch's."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return node.target._schema.name.removeprefix("aten::")
    return ""


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by their names, with those left out at their defaults."""
    given = dict(node.kwargs)
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            given[argument.name] = node.args[index]
        elif argument.name not in given and argument.has_default_value():
            given[argument.name] = argument.default_value
    return given


def value_of(node: object) -> Tensor | None:
    """The value of a node as a tensor without data: shape with symbols, and dtype; None for what is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def shape_of(node: object) -> tuple[int | str, ...] | None:
    """The shape of a node's value, open sizes as text; None for what is no tensor.

    As text, because comparing two symbols of PyTorch's asks what they happen to be.
    """
    value = value_of(node)
    return None if value is None else tuple(size_of(size) for size in value.shape)


def size_of(size: int | torch.SymInt) -> int | str:
    """A number, or the expression of symbols as text."""
    if isinstance(size, int):
        return size
    return _number_or_text(size.node.expr)


@functools.lru_cache(
    4096
)  # to write an expression takes far longer than to find it, and the same ones come up often
def _number_or_text(expression: Any) -> int | str:
    return int(expression) if expression.is_number else str(expression)


def dtype_of(node: object) -> torch.dtype | None:
    """The dtype of a node's value; None for what is no tensor."""
    value = value_of(node)
    return None if value is None else value.dtype


def is_number(node: object) -> bool:
    """Whether a node computes a number from sizes."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), _SYMBOLIC)


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether it is a dropout that is switched off."""
    if name_of(node) not in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
        return False
    return arguments(node)["train"] is False


def updates_statistics(node: fx.Node) -> bool:
    """Whether it is a norm that uses, and so writes, running statistics while it computes its own."""
    if name_of(node) == "batch_norm":
        return arguments(node)["training"] and arguments(node)["running_mean"] is not None
    if name_of(node) == "instance_norm":
        return arguments(node)["use_input_stats"] and arguments(node)["running_mean"] is not None
    return False


def writes(node: fx.Node) -> bool:
    """Whether it is an operator that writes over one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


# Their value shares no memory with anything else.
_FRESH_WORDS = """
    conv1d conv2d conv3d conv_transpose2d linear matmul mm bmm addmm baddbmm batch_norm layer_norm group_norm
    instance_norm rms_norm relu relu6 gelu silu mish elu selu celu leaky_relu hardswish hardsigmoid hardtanh
    softplus sigmoid tanh add sub mul div pow abs neg exp log sqrt rsqrt erf clamp clamp_min clamp_max maximum
    minimum softmax log_softmax mean sum amax amin var std max_pool1d max_pool2d max_pool3d avg_pool1d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d cat stack
    scaled_dot_product_attention clone prelu glu where embedding upsample_bilinear2d upsample_nearest2d
    upsample_bicubic2d eq ne lt gt le ge
"""
_FRESH = frozenset(_FRESH_WORDS.split())


def is_fresh(node: object) -> bool:
    """Whether a node's value is known to share no memory with any other node's (written in place, it is its input's,
    which was fresh itself).
    """
    name = name_of(node)
    return name in _FRESH or (name.endswith("_") and name[:-1] in _FRESH)


def out_of_place(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that gives as a new value what this one, like relu_, writes over its first argument; None where
    there is none, or it would give another dtype.
    """
    name = name_of(node)
    own = value_of(node.args[0]) if node.args else None
    if own is None or not own.is_floating_point() or not name.endswith("_") or name[:-1] not in _FRESH:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = node.target._overloadname
    if packet is None or overload not in packet.overloads():
        return None
    for other in node.all_input_nodes:
        value = value_of(other)
        if value is not None and (value.dtype != own.dtype or value.is_complex()):
            return None
    return getattr(packet, overload)


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def item_of(node: object) -> tuple[fx.Node, Any] | None:
    """(value, index) of an item that is taken out of what an operator gives as a tuple; None for anything else."""
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        return node.args[0], node.args[1]
    return None
