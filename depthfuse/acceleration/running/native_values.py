"""What stands in the place of tensors while a graph becomes a plan of the native engine.

Each value is a tensor [n, h, w, c] of the engine and the axes that PyTorch sees of it, in order: an image is
(n, c, h, w), tokens are (n, hw, c). So permutations and flattenings, which move nothing where
channels lie innermost, cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthfuse.native import plan as native
from depthfuse.native.plan import Builder, Node

Axes = tuple[str, ...]
IMAGE: Axes = ("n", "c", "h", "w")
TOKENS: Axes = ("n", "hw", "c")
ROWS: Axes = ("n", "c")
FLAT: Axes = ("n", "chw")  # an image as the classifiers of VGG and AlexNet read it
# (input [n, h, w, c], filters, a convolution's numbers as df_node has them) -> how to compute it
Algorithms = Callable[[Sequence[int], int, Sequence[int]], int]
_ELEMENTWISE = (native.ADD, native.MULTIPLY, native.MAP)
# How a value of so many axes may be seen.
VIEWS: tuple[Axes, ...] = (IMAGE, ("n", "h", "w", "c"), TOKENS, ("n", "c", "hw"), ROWS, FLAT)


class Unsupported(Exception):
    """What of a graph the engine does not have."""


@dataclass(frozen=True)
class Value:
    """A tensor of the engine, and its axes as PyTorch sees them: "hw" is both of the engine's in one."""

    tensor: int
    axes: Axes


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the input."""

    values: Tensor


def seen(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that PyTorch sees of [n, h, w, c]."""
    sizes = dict(zip("nhwc", shape, strict=True))
    return tuple(math.prod(sizes[name] for name in axis) for axis in axes)


def order(axes: Axes, shape: Sequence[int]) -> str:
    """The axes of [n, h, w, c] in the order in which PyTorch sees them, without those of size 1."""
    sizes = dict(zip("nhwc", shape, strict=True))
    return "".join(name for name in "".join(axes) if sizes[name] > 1)


def need(value: Any, what: str, *axes: Axes) -> Value:
    """`value`, a Value with one of these axes. Raises Unsupported for anything else."""
    if not isinstance(value, Value) or (axes and value.axes not in axes):
        raise Unsupported(f"{what} of {getattr(value, 'axes', value)}")
    return value


class Draft:
    """A plan in the making.

    tiles: the products of bfloat16 that stand for these factors' products where an attention has enough of them.
    writer: what wrote the current operation's first input, where no other operation reads that; else None.
    """

    def __init__(self, algorithms: Algorithms, tiles: int) -> None:
        self.builder, self.algorithms, self.tiles = Builder(), algorithms, tiles
        self.writer: Node | None = None

    def shape(self, value: Value) -> tuple[int, int, int, int]:
        """[n, h, w, c]."""
        return self.builder.shape(value.tensor)

    def size(self, value: Value) -> tuple[int, ...]:
        """The shape that PyTorch sees."""
        return seen(value.axes, self.shape(value))

    def add(self, node: Node, axes: Axes) -> Value:
        self.builder.nodes.append(node)
        return Value(node.y, axes)

    def activate_in_place(self, act: str, slope: float) -> bool:
        """Let `writer` apply an activation, where it can."""
        node = self.writer
        if node is None or node.op not in _ELEMENTWISE or node.act != "none":
            return False
        node.act, node.f = act, slope
        return True

    def constant_like(self, constant: Constant, axes: Axes, shape: Sequence[int]) -> Value:
        """A constant, broadcast to a value's shape: [h, w, c] of it, the same for each image."""
        values = _broadcast(constant, axes, shape)
        if axes[0] != "n" or (shape[0] > 1 and not (values == values[:1]).all()):
            raise Unsupported("a constant that is not the same for each image")
        if axes == IMAGE:
            values = values.permute(0, 2, 3, 1)
        elif axes[-1] != "c":
            raise Unsupported(f"a constant with the axes {axes}")
        y = self.builder.tensor(shape)
        return self.add(Node(native.CONSTANT, -1, y, weight=values[0].contiguous()), axes)

    def constant_of_channels(self, constant: Any, axes: Axes, shape: Sequence[int]) -> Tensor | None:
        """A constant as [c], where each channel has one value of it; None where it does not."""
        if isinstance(constant, (int, float)):
            return torch.full((shape[3],), float(constant))
        if not isinstance(constant, Constant) or "c" not in axes:
            return None
        _broadcast(constant, axes, shape)  # whether it can be
        sizes = dict(zip(reversed(axes), reversed(constant.values.shape), strict=False))
        if any(size > 1 for axis, size in sizes.items() if axis != "c"):
            return None
        return constant.values.float().reshape(-1).expand(shape[3])


def _broadcast(constant: Constant, axes: Axes, shape: Sequence[int]) -> Tensor:
    try:
        return torch.broadcast_to(constant.values, seen(axes, shape))
    except RuntimeError as error:
        raise Unsupported(f"a constant of {list(constant.values.shape)} with the axes {axes}") from error
