"""What the layers and functions of a block are, for those who read its graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import fx, nn

from depthfuse.merging.tracing import LayerTracer

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardtanh,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Tanh,
    nn.Softplus,
)
# Functions, and methods of tensors, that are an activation without further arguments but `inplace`.
ACTIVATION_FUNCTIONS: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), nn.Tanh),
    F.relu6: nn.ReLU6,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.hardswish: nn.Hardswish,
    F.elu: nn.ELU,
    F.leaky_relu: nn.LeakyReLU,
}
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
IN_PLACE = (F.relu_, torch.relu_, "relu_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
DROPOUTS = (nn.Dropout, nn.Dropout2d)


class BlockTracer(LayerTracer):
    """Stochastic depth and layer norm over the last axis, by whatever library, are one layer."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return is_drop_path(module) or is_layer_norm(module) or super().is_leaf_module(module, qualified_name)


def is_drop_path(module: nn.Module) -> bool:
    return isinstance(module, DropPath) or type(module).__name__.endswith(("DropPath", "StochasticDepth"))


def is_layer_norm(module: nn.Module) -> bool:
    """Over the last axis alone."""
    last = getattr(module, "data_format", "channels_last") == "channels_last" and not isinstance(
        module, LayerNorm2d
    )
    return isinstance(module, nn.LayerNorm) and last and len(module.normalized_shape) == 1


def is_sum(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in SUMS
