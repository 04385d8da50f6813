"""What of a plan's graph moves values, or only names them anew, on the native engine.

`native_rules` has what computes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from depthfuse.acceleration.running.native_values import (
    IMAGE,
    ROWS,
    TOKENS,
    VIEWS,
    Constant,
    Draft,
    Unsupported,
    Value,
    need,
    order,
    seen,
)
from depthfuse.native import plan as native
from depthfuse.native.plan import Node


def _sym_size(draft, x, dim) -> int:
    return draft.size(need(x, "a size"))[dim]


def _view(draft: Draft, x: Value, size: Sequence[int]) -> Value:
    """x seen with another shape. Raises Unsupported where values would have to move."""
    shape = draft.shape(x)
    for axes in VIEWS:
        if seen(axes, shape) == tuple(size) and order(axes, shape) == order(x.axes, shape):
            return Value(x.tensor, axes)
    n, c = shape[0], shape[3]
    tokens = order(x.axes, shape) == order(("n", "h", "w", "c"), shape)
    if tokens and len(size) == 4 and (size[0], size[3]) == (n, c):  # rows of another length
        y = draft.builder.tensor(tuple(size))
        draft.builder.copy(x.tensor, y)
        return Value(y, ("n", "h", "w", "c"))
    raise Unsupported(f"{list(draft.size(x))} of the axes {x.axes} seen as {list(size)}")


def _reshape(draft, x, size) -> Value:
    x = need(x, "a reshape")
    size, given = list(size), draft.size(x)
    if -1 in size:
        known = math.prod(length for length in size if length != -1)
        size[size.index(-1)] = math.prod(given) // max(1, known)
    return _view(draft, x, size)


def _flatten(draft, x, start=0, end=-1) -> Value:
    size = draft.size(need(x, "flatten"))
    start, end = start % len(size), end % len(size)
    return _reshape(draft, x, [*size[:start], -1, *size[end + 1 :]])


def _unsqueeze(draft, x, dim) -> Value:
    size = list(draft.size(need(x, "unsqueeze")))
    size.insert(dim % (len(size) + 1), 1)
    return _view(draft, x, size)


def _squeeze(draft, x, dims) -> Value:
    size = draft.size(need(x, "squeeze"))
    gone = {d % len(size) for d in ([dims] if isinstance(dims, int) else dims)}
    return _view(draft, x, [s for i, s in enumerate(size) if i not in gone or s != 1])


def _permute(_draft, x, dims) -> Value:
    x = need(x, "permute")
    return Value(x.tensor, tuple(x.axes[d] for d in dims))


def _transpose(draft, x, a, b) -> Value:
    dims = list(range(len(need(x, "transpose").axes)))
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(draft, x, dims)


def _matrix_transpose(draft, x) -> Value:
    return _transpose(draft, x, -2, -1)


def _contiguous(_draft, x, memory_format=torch.contiguous_format) -> Value:
    """Outputs are written so, and between operations nobody sees a layout."""
    if memory_format != torch.contiguous_format:
        raise Unsupported(f"an output in {memory_format}")
    return need(x, "contiguous")


def _part(draft: Draft, x: Any, dim: int, first: int, count: int, step: int = 1) -> Value:
    """`count` of x along an axis, the first at `first` and each `step` further on."""
    x = need(x, "a part", IMAGE, ("n", "h", "w", "c"), TOKENS, ROWS)
    axis, builder = x.axes[dim], draft.builder
    n, h, w, c = draft.shape(x)
    if count == draft.size(x)[dim]:
        return x
    if step != 1 and axis not in ("h", "w"):
        raise Unsupported(f"a part of {count} along {axis} in steps of {step}")
    if axis == "c":
        y = builder.tensor((n, h, w, count))
        builder.copy(x.tensor, y, x_channel=first, channels=count)
    elif axis == "hw":
        y = builder.tensor((n, 1, count, c))
        builder.copy(x.tensor, y, x_pixel=first, pixels=count)
    elif axis in ("h", "w"):
        y = builder.tensor((n, count, w, c) if axis == "h" else (n, h, count, c))
        numbers = (-first, 0, step, 1) if axis == "h" else (0, -first, 1, step)
        builder.nodes.append(Node(native.PAD, x.tensor, y, numbers=numbers))
    else:
        raise Unsupported(f"a part along {axis}")
    return Value(y, x.axes)


def _slice(draft, x, dim=0, start=None, end=None, step=1) -> Value:
    size = draft.size(need(x, "a slice"))[dim]
    taken = range(*slice(start, end, step).indices(size))
    if not taken:
        raise Unsupported("an empty slice")
    return _part(draft, x, dim, taken.start, len(taken), step)


def _split_sizes(draft, x, sizes, dim=0) -> list[Value]:
    parts, at = [], 0
    for size in sizes:
        parts.append(_part(draft, x, dim, at, size))
        at += size
    return parts


def _split(draft, x, size, dim=0) -> list[Value]:
    whole = draft.size(need(x, "split"))[dim]
    return _split_sizes(draft, x, [min(size, whole - at) for at in range(0, whole, size)], dim)


def _chunk(draft, x, chunks, dim=0) -> list[Value]:
    whole = draft.size(need(x, "chunk"))[dim]
    return _split(draft, x, max(1, -(-whole // chunks)), dim)


def _getitem(_draft, values, index) -> Value:
    return values[index]


def _select(draft, x, dim, index) -> Value:
    x = need(x, "select", TOKENS)
    if dim % 3 != 1:
        raise Unsupported(f"select along axis {dim}")
    part = _part(draft, x, dim, index % draft.size(x)[1], 1)
    return Value(part.tensor, ROWS)


def _cat(draft, parts, dim=0) -> Value:
    first = need(
        next(p for p in parts if isinstance(p, Value)), "cat", IMAGE, ("n", "h", "w", "c"), TOKENS, ROWS
    )
    axes, builder = first.axes, draft.builder
    axis = axes[dim]
    if axis not in ("c", "hw"):
        raise Unsupported(f"cat along {axis}")
    n, h, w, c = draft.shape(first)
    lengths = [
        (p.values.shape if isinstance(p, Constant) else draft.size(need(p, "cat", axes)))[dim] for p in parts
    ]
    whole = sum(lengths)
    y, at = builder.tensor((n, h, w, whole) if axis == "c" else (n, 1, whole, c)), 0
    for part, length in zip(parts, lengths, strict=True):
        shape = (n, h, w, length) if axis == "c" else (n, 1, length, c)
        source = draft.constant_like(part, axes, shape) if isinstance(part, Constant) else part
        builder.copy(source.tensor, y, **{"y_channel" if axis == "c" else "y_pixel": at})
        at += length
    return Value(y, axes)


def _resize(draft: Draft, x: Any, size: Any, scales: Any, mode: int) -> Value:
    x = need(x, "a change of size", IMAGE)
    n, h, w, c = draft.shape(x)
    if size is None:
        size = [int(length * scale) for length, scale in zip((h, w), scales, strict=True)]
        if any(new != length * scale for new, length, scale in zip(size, (h, w), scales, strict=True)):
            raise Unsupported(f"a change of size by {scales}")  # PyTorch steps by the scale, not by the sizes
    y = draft.builder.tensor((n, *size, c))
    return draft.add(Node(native.RESIZE, x.tensor, y, numbers=(mode,)), IMAGE)


def _nearest(draft, x, size=None, scales=None) -> Value:
    return _resize(draft, x, size, scales, native.NEAREST)


def _bilinear(draft, x, size=None, align_corners=False, scales=None) -> Value:
    return _resize(draft, x, size, scales, native.BILINEAR_CORNERS if align_corners else native.BILINEAR)


def _pad(draft, x, padding, mode="constant", value=None) -> Value:
    x = need(x, "a padding", IMAGE)
    left, right, above, below, *more = [*padding, 0, 0, 0, 0][: max(4, len(padding))]
    if mode != "constant" or len(more) > 2:
        raise Unsupported(f"a padding {list(padding)} of mode {mode}")
    n, h, w, c = draft.shape(x)
    fill = 0.0 if value is None else float(value)
    if (left, right, above, below) != (0, 0, 0, 0):
        y = draft.builder.tensor((n, h + above + below, w + left + right, c))
        x = draft.add(Node(native.PAD, x.tensor, y, numbers=(above, left, 1, 1), f=fill), IMAGE)
    if any(more):  # channels
        before, after = more
        if before < 0 or after < 0:
            raise Unsupported("channels cut off by a padding")
        fills = [Constant(torch.full((1, count, 1, 1), fill)) for count in (before, after)]
        parts = [fills[0]] * bool(before) + [x] + [fills[1]] * bool(after)
        x = _cat(draft, parts, 1)
    return x


def _identity(_draft, x, **_) -> Value:
    return need(x, "a copy")


_ATEN = torch.ops.aten
MOVES: dict[Any, Callable[..., Any]] = {
    _ATEN.reshape.default: _reshape,
    _ATEN.flatten.using_ints: _flatten,
    _ATEN.unsqueeze.default: _unsqueeze,
    _ATEN.squeeze.dim: _squeeze,
    _ATEN.squeeze.dims: _squeeze,
    _ATEN.permute.default: _permute,
    _ATEN.transpose.int: _transpose,
    _ATEN.mT.default: _matrix_transpose,
    _ATEN.contiguous.default: _contiguous,
    _ATEN.clone.default: _identity,
    _ATEN.slice.Tensor: _slice,
    _ATEN.split.Tensor: _split,
    _ATEN.split_with_sizes.default: _split_sizes,
    _ATEN.chunk.default: _chunk,
    operator.getitem: _getitem,
    _ATEN.select.int: _select,
    _ATEN.cat.default: _cat,
    _ATEN.pad.default: _pad,
    _ATEN.upsample_nearest2d.vec: _nearest,
    _ATEN.upsample_bilinear2d.vec: _bilinear,
    _ATEN.sym_size.int: _sym_size,
}
