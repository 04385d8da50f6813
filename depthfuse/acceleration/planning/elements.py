"""What a graph node does to its input, of what fusion knows: an affine map, an activation, an addition, a permutation,
a LayerNorm over the channels.

`read(node, value)` turns an operator's call into a list of such elements, which is all that fusion has to know about
it. Axes are negative (counted from the last), so that they hold for any number of leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.graph import constant_of


@dataclass(frozen=True)
class Affine:
    """x * scale + shift along one axis; both float64, of shape [C] (or [] for one number) or None."""

    scale: Tensor | None
    shift: Tensor | None
    axis: int


@dataclass(frozen=True)
class Act:
    """One of `depthfuse.ops.ACTIVATIONS`."""

    name: str


@dataclass(frozen=True)
class Add:
    """Addition of another value of the graph, of the same shape and dtype."""

    other: fx.Node


@dataclass(frozen=True)
class Permute:
    """A permutation of all axes."""

    dims: tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    """LayerNorm over one axis; weight and bias float64 [C] or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    axis: int


Element = Affine | Act | Add | Permute | Norm

_ACTIVATIONS = {"relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish"}


def activation_of(node: fx.Node) -> str | None:
    """The name of the activation that a node is, or None."""
    name = aten.name_of(node)
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    if not name:
        return None
    given = aten.arguments(node)
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(given["approximate"])
    bounds = None
    if name == "hardtanh":
        bounds = given["min_val"], given["max_val"]
    elif name == "clamp" and node.target._overloadname == "default":
        bounds = given["min"], given["max"]
    elif name == "clamp_min" and node.target._overloadname == "default":
        bounds = given["min"], None
    return {(0, 6): "relu6", (0, None): "relu"}.get(bounds) if bounds else None


def batch_norm(node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of a batch norm by fixed statistics in float64, [C], or None for any other node."""
    name = aten.name_of(node)
    if name not in ("batch_norm", "_native_batch_norm_legit_no_training"):
        return None
    given = aten.arguments(node)
    if given.get("training", False):
        return None
    parts = {key: constant_of(given[key]) for key in ("weight", "bias", "running_mean", "running_var")}
    known = [given[key] is None or part is not None for key, part in parts.items()]
    mean, variance = parts["running_mean"], parts["running_var"]
    if not all(known) or mean is None or variance is None:
        return None
    scale = (variance.double() + given["eps"]).rsqrt()
    if parts["weight"] is not None:
        scale = scale * parts["weight"].double()
    shift = -mean.double() * scale
    return scale, shift if parts["bias"] is None else shift + parts["bias"].double()


def layer_norm(node: object) -> Norm | None:
    """What a LayerNorm over the last axis does, or None for any other node."""
    name = aten.name_of(node)
    if name not in ("layer_norm", "native_layer_norm"):
        return None
    given = aten.arguments(node)
    weight, bias = (constant_of(given[key]) for key in ("weight", "bias"))
    known = all(given[key] is None or t is not None for key, t in (("weight", weight), ("bias", bias)))
    if not known or len(given["normalized_shape"]) != 1:
        return None
    weight, bias = (None if t is None else t.detach().double() for t in (weight, bias))
    return Norm(weight, bias, given["eps"], -1)


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """The order of axes that a node gives its input, or None for any other node."""
    name = aten.name_of(node)
    if name not in ("permute", "transpose", "t", "numpy_T", "mT"):
        return None
    ndim = len(aten.shape_of(node) or ())
    order = list(range(ndim))
    if name == "permute":
        return tuple(d % ndim for d in aten.arguments(node)["dims"])
    a, b = (-2, -1) if name != "transpose" else (aten.arguments(node)["dim0"], aten.arguments(node)["dim1"])
    if ndim < 2 or not isinstance(a, int) or not isinstance(b, int):
        return None
    order[a % ndim], order[b % ndim] = order[b % ndim], order[a % ndim]
    return tuple(order)


def _constant_affine(constant: Tensor | float, name: str, is_second: bool, ndim: int) -> Affine | None:
    """Arithmetic with a constant that varies along one axis at most."""
    number = not isinstance(constant, Tensor)  # Python's have all digits of float64
    value = torch.tensor(constant, dtype=torch.float64) if number else constant.detach()
    if value.is_complex():
        return None
    value = value.double()
    wide = [axis for axis, size in enumerate(value.shape) if size != 1]
    if len(wide) > 1 or value.dim() > ndim:
        return None
    axis = wide[0] - value.dim() if wide else -1
    value = value.reshape(-1) if wide else value.reshape(())
    if name == "mul":
        return Affine(value, None, axis)
    if name == "div":
        return Affine(1 / value, None, axis) if is_second else None
    if name == "add":
        return Affine(None, value, axis)
    return Affine(None, -value, axis) if is_second else Affine(-torch.ones_like(value), value, axis)


def _arithmetic(node: fx.Node, value: fx.Node, name: str) -> list[Element] | None:
    given = aten.arguments(node)
    first, second = given["self"], given["other"]
    if (first is value) == (second is value):
        return None
    is_second = first is value  # the constant comes second
    other = second if is_second else first
    if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
        return None
    if aten.shape_of(node) != aten.shape_of(value):
        return None
    constant: Any = other if type(other) in (int, float) else constant_of(other)
    if constant is not None:
        affine = _constant_affine(constant, name, is_second, len(aten.shape_of(value) or ()))
        return [affine] if affine else None
    if name != "add" or not isinstance(other, fx.Node) or aten.shape_of(other) != aten.shape_of(value):
        return None
    mine, theirs = aten.value_of(value), aten.value_of(other)
    return [Add(other)] if mine is not None and theirs is not None and mine.dtype == theirs.dtype else None


def read(node: fx.Node, value: fx.Node) -> list[Element] | None:
    """The elements that `node` applies to its input `value`, in order, or None where it does anything else."""
    before, after = aten.value_of(value), aten.value_of(node)
    name = aten.name_of(node)
    if before is None or not name:
        return None
    if name == "_native_batch_norm_legit_no_training" and node.args[0] is value:
        return _scaled(node, before)
    if after is None or after.dtype != before.dtype:
        return None
    if name in ("add", "sub", "mul", "div"):
        return _arithmetic(node, value, name)
    if node.args[:1] != (value,) or sum(argument is value for argument in node.all_input_nodes) != 1:
        return None
    if name == "batch_norm":
        return _scaled(node, before)
    act = activation_of(node)
    if act:
        return [Act(act)]
    order = permutation(node)
    if order:
        return [Permute(order)]
    norm = layer_norm(node)
    return [norm] if norm else None


def _scaled(node: fx.Node, before: Tensor) -> list[Element] | None:
    found = batch_norm(node)
    return [Affine(*found, 1 - before.dim())] if found else None
