"""What stands in the place of tensors while a graph becomes a plan of the native engine.

Each value is a tensor [n, h, w, c] of the engine and the axes that PyTorch sees of it, in order: an image is
(n, c, h, w), tokens are (n, hw, c). So permutations and flattenings, which move nothing where
channels lie innermost, cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Axes = tuple[str, ...]
IMAGE: Axes = ("n", "c", "h", "w")
TOKENS: Axes = ("n", "hw", "c")
ROWS: Axes = ("n", "c")
# How a value of so many axes may be seen.
VIEWS: tuple[Axes, ...] = (IMAGE, ("n", "h", "w", "c"), TOKENS, ("n", "c", "hw"), ROWS)


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
