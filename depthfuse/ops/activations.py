"""The activations that every depthfuse op knows, by name, and the tail in plain PyTorch that each op ends in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.kernels.arguments import Tail


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x, approximate="tanh")


@dataclass(frozen=True)
class Activation:
    """One activation: out of place, in place, and as the post-op (name, scalars, algorithm) of oneDNN's fused
    ops.
    """

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    post_op: tuple[str, list[float], str]


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda x: x, lambda x: x, ("none", [], "")),
    "relu": Activation(F.relu, torch.relu_, ("relu", [], "")),
    "relu6": Activation(F.relu6, lambda x: F.hardtanh_(x, 0.0, 6.0), ("hardtanh", [0.0, 6.0], "")),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_, ("gelu", [], "none")),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_, ("gelu", [], "tanh")),
    "silu": Activation(F.silu, lambda x: F.silu(x, inplace=True), ("swish", [], "")),
    "hardswish": Activation(F.hardswish, lambda x: F.hardswish(x, inplace=True), ("hardswish", [], "")),
}


def activation(name: str) -> Activation:
    """Look an activation up. Raises ValueError, naming those there are, for an unknown one."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ValueError(f"unknown act {name!r}; expected one of {', '.join(ACTIVATIONS)}") from None


def finish(z: Tensor, tail: Tail, shape: tuple[int, ...]) -> Tensor:
    """scale * act(z + residual) + shift in plain PyTorch; the bias is in `z`. Vectors of `shape` broadcast to z."""
    y = activation(tail.act).apply(z if tail.residual is None else z + tail.residual)
    if tail.scale is not None:
        y = y * tail.scale.view(shape)
    return y if tail.shift is None else y + tail.shift.view(shape)
