"""What a graph node does to its input, of what fusion knows: an affine map, an activation, an addition, a permutation,
a LayerNorm over the channels.

`read(node, value)` turns a node into a list of such elements, which is all that fusion has to know about it.
Axes are negative (counted from the last), so that they hold for any number of leading axes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from depthfuse.acceleration.planning.graph import constant_of, module_of
from depthfuse.merging.algebra import norm_affine
from depthfuse.merging.merged_blocks import TokenBatchNorm


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
    """Addition of another value of the graph, of the same shape."""

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

_NO_OPS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, DropPath)
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_ACT_FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    "relu": "relu",
    "relu_": "relu",
}


def is_no_op(node: fx.Node) -> bool:
    """Whether the node hands its input on unchanged in evaluation mode."""
    if node.op == "call_module":
        return isinstance(module_of(node), _NO_OPS)
    if node.op == "call_function" and node.target is F.dropout:
        return node.kwargs.get("training", True) is False
    return False


def act_of_module(module: nn.Module) -> str | None:
    """The name of the activation that `module` is, or None."""
    kind = type(module)
    name = kind.__name__
    if kind is nn.GELU or name in ("GELU", "GELUTanh", "GELU_"):
        tanh = getattr(module, "approximate", "tanh" if name == "GELUTanh" else "none") == "tanh"
        return "gelu_tanh" if tanh else "gelu"
    if kind is nn.Hardtanh and (module.min_val, module.max_val) == (0.0, 6.0):
        return "relu6"
    names = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
    timm_names = {"Swish": "silu", "HardSwish": "hardswish", "HardSwishMe": "hardswish", "SwishMe": "silu"}
    return names.get(kind) or (timm_names.get(name) if kind.__module__.startswith("timm.") else None)


def batch_norm_affine(norm: nn.Module, axis: int) -> Affine | None:
    """Evaluation-mode batch norm as an affine map in float64, or None where it uses the batch's own
    statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        return None
    scale, shift = norm_affine(norm)
    return Affine(scale, shift, axis)


def layer_norm(module: nn.Module) -> Norm | None:
    """What a LayerNorm over the last axis does, or None for any other module."""
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
        return None
    weight, bias = (None if t is None else t.detach().double() for t in (module.weight, module.bias))
    return Norm(weight, bias, module.eps, -1)


def _module_elements(module: nn.Module, ndim: int) -> list[Element] | None:
    name = act_of_module(module)
    if name:
        return [Act(name)]
    channel_axis = 1 - ndim
    if isinstance(module, TokenBatchNorm):
        affine = batch_norm_affine(module, -1)
        return [affine] if affine else None
    if isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward:
        affine = batch_norm_affine(module, channel_axis)
        return [affine] if affine else None
    norm = layer_norm(module)
    return [norm] if norm else None


def _constant_affine(node: fx.Node, constant: Tensor | float, multiply: bool, ndim: int) -> Affine | None:
    """Multiplication or addition of a constant that varies along one axis at most."""
    value = torch.as_tensor(constant).detach().double()
    wide = [axis for axis, size in enumerate(value.shape) if size != 1]
    if len(wide) > 1 or value.dim() > ndim:
        return None
    axis = wide[0] - value.dim() if wide else -1
    value = value.reshape(-1) if wide else value.reshape(())
    return Affine(value, None, axis) if multiply else Affine(None, value, axis)


def read(node: fx.Node, value: fx.Node) -> list[Element] | None:
    """The elements that `node` applies to its input `value`, in order, or None where it does anything
    else.
    """
    shape = value.meta.get("shape")
    if shape is None:
        return None
    ndim = len(shape)
    if node.op == "call_module":
        return _module_elements(module_of(node), ndim) if node.args == (value,) else None
    if node.target in _ADDS | _MULS and len(node.args) == 2 and not node.kwargs:
        other = node.args[1] if node.args[0] is value else node.args[0]
        if other is value:
            return None
        constant = other if isinstance(other, int | float) else constant_of(other)
        multiply = node.target in _MULS
        if constant is not None:
            affine = _constant_affine(node, constant, multiply, ndim)
            return [affine] if affine and node.meta.get("shape") == shape else None
        if isinstance(other, fx.Node) and not multiply and other.meta.get("shape") == shape:
            return [Add(other)]
        return None
    if node.args[:1] != (value,):
        return None
    if node.target in _ACT_FUNCTIONS:
        return [Act(_ACT_FUNCTIONS[node.target])]
    if node.target is F.gelu:
        return [Act("gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu")]
    if node.target == "permute":
        dims = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        return [Permute(tuple(dims))] if all(isinstance(d, int) for d in dims) else None
    return None
