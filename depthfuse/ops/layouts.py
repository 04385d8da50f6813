"""The memory layouts that the ops give back and their kernels read, and copies into them where a tensor has another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from depthfuse.kernels.arguments import Tail


def nhwc(x: Tensor) -> Tensor:
    """x [N, C, H, W] in channels_last; a copy only where it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_nhwc(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of `shape` in channels_last, of the dtype and on the device of `like`."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def dense_nhwc(x: Tensor) -> Tensor:
    """x with exactly the strides of `empty_nhwc`; a copy only where it has others."""
    # Exact strides, not `is_contiguous(memory_format=...)`: that one ignores axes of size 1, the fake kernel does not.
    _, channels, height, width = x.shape
    if x.stride() == (height * width * channels, 1, width * channels, channels):
        return x
    return empty_nhwc(x.shape, x).copy_(x)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, each contiguous or None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def depthwise_weight(weight: Tensor) -> Tensor:
    """weight [C, 1, R, S] as the kernels take it: any strides that make one axis of its taps, as `pack_weight` does."""
    if weight.stride(2) == weight.shape[3] * weight.stride(3):
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Layout:
    """The memory layout of a result: what makes an empty one of a shape, like a tensor, and what brings one into it."""

    empty: Callable[[Sequence[int], Tensor], Tensor]
    dense: Callable[[Tensor], Tensor]


IMAGES = Layout(empty_nhwc, dense_nhwc)  # [N, C, H, W] in channels_last
ROWS = Layout(lambda shape, like: like.new_empty(shape), Tensor.contiguous)


def image_tail(tail: Tail) -> Tail:
    """The tail as the kernels of images read it."""
    bias, scale, shift = contiguous(tail.bias, tail.scale, tail.shift)
    return Tail(bias, None if tail.residual is None else nhwc(tail.residual), scale, shift, tail.act)


def row_tail(tail: Tail) -> Tail:
    """The tail as the kernels of rows read it."""
    return Tail(*contiguous(*tail[:4]), tail.act)
