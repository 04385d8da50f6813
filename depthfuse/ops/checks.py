"""Argument checks that the ops share. Each error gives the argument, its shape or dtype, and what was
expected.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from depthfuse.kernels.arguments import Tail
from depthfuse.ops.activations import activation


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


def check_same_kind(op: str, x: Tensor, others: dict[str, Tensor | None], first: str = "x") -> None:
    """Raise TypeError for another dtype than x's or one that is not floating point, ValueError for another
    device. `first` is what x is called.
    """
    if not x.is_floating_point():
        raise TypeError(f"{op}: {first} has dtype {x.dtype}, expected a floating-point dtype")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected x's dtype {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected x's device {x.device}")


def check_tail(op: str, shape: Sequence[int], tail: Tail, *, channel_dim: int, bias: str = "bias") -> None:
    """Raise ValueError unless bias, scale and shift are [K] and the residual has the output's `shape`, where given, or
    for an unknown activation. `bias` is what the op calls it.
    """
    activation(tail.act)
    channels = shape[channel_dim]
    for name, tensor in tail.tensors(bias).items():
        if name == "residual":
            check_shape(op, name, tensor, shape, "the output's shape")
        else:
            check_shape(op, name, tensor, [channels], f"the output has {channels} channels")


def check_channels(op: str, **counts: int) -> None:
    """Raise ValueError for a number of channels that 32 bits do not hold: the kernels count channels in that many."""
    for name, count in counts.items():
        if count >= 2**31:
            raise ValueError(f"{op}: {name} has {count} channels, expected fewer than 2**31")


def check_norm_eps(op: str, norm_eps: float | None) -> None:
    """Raise ValueError for a negative epsilon."""
    if norm_eps is not None and not norm_eps >= 0:
        raise ValueError(f"{op}: norm_eps is {norm_eps}, expected None or a number of at least 0")
