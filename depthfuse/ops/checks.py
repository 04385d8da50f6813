"""Argument checks that the ops share. Each error gives the argument, its shape or dtype, and what was
expected.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def shape_text(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def check_shape(op: str, name: str, tensor: Tensor | None, expected: Sequence[int], why: str) -> None:
    """Raise ValueError unless `tensor` is None or has the `expected` shape; `why` says where that comes
    from.
    """
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name} has shape {shape_text(tensor.shape)}, expected {shape_text(expected)} ({why})"
        )


def check_same_kind(op: str, x: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raise TypeError for another dtype than x's or one that is not floating point, ValueError for another
    device.
    """
    if not x.is_floating_point():
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected a floating-point dtype")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected x's dtype {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected x's device {x.device}")
