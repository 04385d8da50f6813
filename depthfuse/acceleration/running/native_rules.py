"""How each operation of a plan's graph becomes nodes of the native engine."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from depthfuse.acceleration.running.native_values import (
    IMAGE,
    ROWS,
    TOKENS,
    VIEWS,
    Constant,
    Unsupported,
    Value,
    need,
    order,
    seen,
)
from depthfuse.fused.blocks import FusedAttention
from depthfuse.fused.layers import FusedConv2d, FusedLinear
from depthfuse.kernels.arguments import Window
from depthfuse.native import plan as native
from depthfuse.native.plan import Node

if TYPE_CHECKING:
    from depthfuse.acceleration.running.native_lowering import Lowering

# Products.


def _tail(module: FusedConv2d | FusedLinear) -> dict[str, Any]:
    tensors = module.tensors()
    return {"act": module.act, **{name: tensors[name] for name in ("bias", "scale", "shift")}}


def _residual(lowering: Lowering, residual: Any, like: Value) -> int:
    if residual is None:
        return -1
    residual = need(residual, "a residual", like.axes)
    if lowering.shape(residual) != lowering.shape(like):
        raise Unsupported("a residual that is broadcast")
    return residual.tensor


def _conv(lowering: Lowering, module: FusedConv2d, x: Any, residual: Any = None) -> Value:
    x = need(x, "a convolution", IMAGE)
    config, weight, builder = module.config(), module.weight, lowering.builder
    n, h, w, c = lowering.shape(x)
    filters, group_channels, *kernel = weight.shape
    stride, padding, dilation = (tuple(config[name]) for name in ("stride", "padding", "dilation"))
    if config.get("norm_eps") is not None:
        raise Unsupported("a convolution with a norm")
    size = Window(stride, padding, dilation).output_size((h, w), kernel)
    y = Value(builder.tensor((n, *size, filters)), IMAGE)
    builder.pad(x.tensor, max(padding))
    common = {"x2": _residual(lowering, residual, y), **_tail(module)}
    numbers = (*kernel, *stride, *padding, *dilation)
    groups = config["groups"]
    if groups == filters == c and group_channels == 1:
        taps = weight.permute(2, 3, 1, 0)
        return lowering.add(
            Node(native.DEPTHWISE, x.tensor, y.tensor, numbers=numbers, weight=taps, **common), IMAGE
        )
    square = groups == 1 and numbers == (3, 3, 1, 1, padding[0], padding[0], 1, 1)
    algorithm = lowering.algorithms((n, h, w, c), filters, padding[0]) if square else native.DIRECT
    node = Node(
        native.CONV,
        x.tensor,
        y.tensor,
        algorithm=algorithm,
        numbers=numbers,
        groups=groups,
        weight=weight.permute(0, 2, 3, 1),
        **common,
    )
    return lowering.add(node, IMAGE)


def _linear(lowering: Lowering, module: FusedLinear, x: Any, residual: Any = None) -> Value:
    x = need(x, "a linear layer")
    if x.axes[-1] != "c" or module.config().get("norm_eps") is not None:
        raise Unsupported(f"a linear layer over {x.axes}")
    builder = lowering.builder
    y = Value(builder.tensor((*lowering.shape(x)[:3], module.weight.shape[0])), x.axes)
    common = {"x2": _residual(lowering, residual, y), **_tail(module)}
    numbers = (1, 1, 1, 1, 0, 0, 1, 1)
    return lowering.add(
        Node(native.CONV, x.tensor, y.tensor, numbers=numbers, weight=module.weight, **common), x.axes
    )


def _attention(lowering: Lowering, module: FusedAttention, x: Any) -> Value:
    x = need(x, "attention", TOKENS)
    config, builder = module.config(), lowering.builder
    *pixels, channels = lowering.shape(x)
    y = builder.tensor((*pixels, channels // 3))
    scale = config["scale"] or (channels // 3 // config["heads"]) ** -0.5
    return lowering.add(Node(native.ATTENTION, x.tensor, y, numbers=(config["heads"],), f=scale), x.axes)


# Norms and pools.


def _layer_norm(lowering, x, shape, weight=None, bias=None, eps=1e-5, *_) -> Value:
    x = need(x, "a layer norm")
    if x.axes[-1] != "c" or list(shape) != [lowering.shape(x)[3]]:
        raise Unsupported(f"a layer norm over {shape} of {x.axes}")
    affine = {}
    for name, values in (("weight", weight), ("bias", bias)):
        if isinstance(values, Value):
            raise Unsupported("a layer norm whose affine depends on the input")
        affine[name] = None if values is None else values.values
    y = lowering.builder.tensor(lowering.shape(x))
    return lowering.add(Node(native.LAYER_NORM, x.tensor, y, f=eps, **affine), x.axes)


def _batch_norm(lowering, x, weight, bias, mean, variance, training, momentum, eps, *_) -> Value:
    x = need(x, "a batch norm", IMAGE, ROWS)
    if training or not isinstance(mean, Constant) or not isinstance(variance, Constant):
        raise Unsupported("a batch norm with the statistics of its batch")
    if isinstance(weight, Value) or isinstance(bias, Value):
        raise Unsupported("a batch norm whose affine depends on the input")
    scale = (variance.values.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.values.double()
    shift = -mean.values.double() * scale
    if bias is not None:
        shift = shift + bias.values.double()
    return _map(lowering, x, scale.float(), shift.float())


def _group_norm(lowering, x, groups, weight=None, bias=None, eps=1e-5, *_) -> Value:
    x = need(x, "a group norm", IMAGE)
    if isinstance(weight, Value) or isinstance(bias, Value):
        raise Unsupported("a group norm whose affine depends on the input")
    affine = {"weight": weight and weight.values, "bias": bias and bias.values}
    y = lowering.builder.tensor(lowering.shape(x))
    return lowering.add(Node(native.GROUP_NORM, x.tensor, y, numbers=(groups,), f=eps, **affine), IMAGE)


def _window_of_pool(lowering, x, kernel, stride, padding, dilation, ceil) -> tuple[Value, tuple[int, ...]]:
    """(The output, the numbers of the window); a last window that starts beyond the image is none, as in PyTorch."""
    kernel, stride, padding, dilation = (
        (p * 2)[:2] for p in (list(kernel), list(stride) or list(kernel), list(padding), list(dilation))
    )
    n, h, w, c = lowering.shape(x)
    size = list(Window(stride, padding, dilation).output_size((h, w), kernel))
    if ceil:
        for i, length in enumerate((h, w)):
            room = length + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
            more = room % stride[i] and size[i] * stride[i] < length + padding[i]
            size[i] += bool(more)
    y = Value(lowering.builder.tensor((n, *size, c)), IMAGE)
    return y, (*kernel, *stride, *padding, *dilation)


def _max_pool(lowering, x, kernel, stride=(), padding=(0,), dilation=(1,), ceil=False) -> Value:
    x = need(x, "a pool", IMAGE)
    y, window = _window_of_pool(lowering, x, kernel, stride, padding, dilation, ceil)
    numbers = (*window, 0, int(ceil))
    return lowering.add(Node(native.MAX_POOL, x.tensor, y.tensor, numbers=numbers), IMAGE)


def _average_pool(
    lowering, x, kernel, stride=(), padding=(0,), ceil=False, padded=True, divisor=None
) -> Value:
    x = need(x, "a pool", IMAGE)
    if divisor is not None:
        raise Unsupported(f"a pool that divides by {divisor}")
    y, window = _window_of_pool(lowering, x, kernel, stride, padding, (1,), ceil)
    numbers = (*window, int(padded), int(ceil))
    return lowering.add(Node(native.AVERAGE_POOL, x.tensor, y.tensor, numbers=numbers), IMAGE)


def _average(lowering, x, size) -> Value:
    x = need(x, "a pool", IMAGE)
    if list(size) != [1, 1]:
        raise Unsupported(f"a pool to {size}")
    n, _, _, c = lowering.shape(x)
    return lowering.add(Node(native.MEAN, x.tensor, lowering.builder.tensor((n, 1, 1, c))), IMAGE)


def _mean(lowering, x, dims=None, keepdim=False) -> Value:
    x = need(x, "a mean")
    reduced = {x.axes[d] for d in dims} if dims else set(x.axes)
    if "".join(sorted("".join(reduced))) != "hw":
        raise Unsupported(f"a mean over {reduced}")
    n, _, _, c = lowering.shape(x)
    axes = x.axes if keepdim else tuple(a for a in x.axes if a not in reduced)
    return lowering.add(Node(native.MEAN, x.tensor, lowering.builder.tensor((n, 1, 1, c))), axes)


# Value by value.


def _map(lowering: Lowering, x: Value, weight: Tensor | None = None, bias: Tensor | None = None) -> Value:
    """weight * x + bias, both [c]."""
    y = lowering.builder.tensor(lowering.shape(x))
    return lowering.add(Node(native.MAP, x.tensor, y, weight=weight, bias=bias), x.axes)


def _combine(lowering: Lowering, op: int, a: Any, b: Any) -> Value:
    """A sum or a product of two values, of which one may be broadcast, or of a value and a constant."""
    value, other = (a, b) if isinstance(a, Value) else (b, a)
    if not isinstance(other, Value):
        channels = lowering.constant_of_channels(other, value.axes, lowering.shape(value))
        if channels is not None:
            return _map(lowering, value, **{"bias" if op == native.ADD else "weight": channels})
        other = lowering.constant_like(other, value.axes, lowering.shape(value))
    other = need(other, "an operand", value.axes)
    shapes = [lowering.shape(value), lowering.shape(other)]
    whole = tuple(map(max, *shapes))
    if shapes[0] != whole:
        value, other = other, value
        shapes.reverse()
    if shapes[0] != whole or any(s not in (1, t) for s, t in zip(shapes[1], whole, strict=True)):
        raise Unsupported("two operands that are both broadcast")
    y = lowering.builder.tensor(whole)
    return lowering.add(Node(op, value.tensor, y, x2=other.tensor), value.axes)


def _add(lowering, a, b) -> Value:
    return _combine(lowering, native.ADD, a, b)


def _multiply(lowering, a, b) -> Value:
    return _combine(lowering, native.MULTIPLY, a, b)


def _square(lowering, x) -> Value:
    return _combine(lowering, native.MULTIPLY, x, x)


def _subtract(lowering, a, b) -> Value:
    if not isinstance(a, Value) or isinstance(b, Value):
        raise Unsupported("a difference of values")
    return _combine(lowering, native.ADD, a, Constant(-b.values) if isinstance(b, Constant) else -b)


def _divide(lowering, a, b) -> Value:
    if not isinstance(a, Value) or isinstance(b, Value):
        raise Unsupported("a quotient of values")
    return _combine(
        lowering, native.MULTIPLY, a, Constant(1 / b.values) if isinstance(b, Constant) else 1 / b
    )


def _activation(name: str) -> Callable[..., Value]:
    return lambda lowering, x: _activate(lowering, x, name)


def _activate(lowering: Lowering, x: Any, act: str, slope: float = 0.0) -> Value:
    x = need(x, "an activation")
    if lowering.activate_in_place(act, slope):
        return x
    y = lowering.builder.tensor(lowering.shape(x))
    return lowering.add(Node(native.MAP, x.tensor, y, act=act, f=slope), x.axes)


def _gelu(lowering, x, approximate="none") -> Value:
    return _activate(lowering, x, "gelu_tanh" if approximate == "tanh" else "gelu")


def _leaky_relu(lowering, x, negative_slope=0.01) -> Value:
    return _activate(lowering, x, "leaky_relu", negative_slope)


def _hardtanh(lowering, x, low=-1.0, high=1.0) -> Value:
    if (low, high) != (0, 6):
        raise Unsupported(f"a clamp to {low} and {high}")
    return _activate(lowering, x, "relu6")


# What moves values, or only names them anew.


def _sym_size(lowering, x, dim) -> int:
    return lowering.size(need(x, "a size"))[dim]


def _view(lowering: Lowering, x: Value, size: Sequence[int]) -> Value:
    """x seen with another shape. Raises Unsupported where values would have to move."""
    shape = lowering.shape(x)
    for axes in VIEWS:
        if seen(axes, shape) == tuple(size) and order(axes, shape) == order(x.axes, shape):
            return Value(x.tensor, axes)
    n, c = shape[0], shape[3]
    tokens = order(x.axes, shape) == order(("n", "h", "w", "c"), shape)
    if tokens and len(size) == 4 and (size[0], size[3]) == (n, c):  # rows of another length
        y = lowering.builder.tensor(tuple(size))
        lowering.builder.copy(x.tensor, y)
        return Value(y, ("n", "h", "w", "c"))
    raise Unsupported(f"{list(lowering.size(x))} of the axes {x.axes} seen as {list(size)}")


def _reshape(lowering, x, size) -> Value:
    x = need(x, "a reshape")
    size, given = list(size), lowering.size(x)
    if -1 in size:
        known = 1
        for length in size:
            known *= length if length != -1 else 1
        whole = 1
        for length in given:
            whole *= length
        size[size.index(-1)] = whole // max(1, known)
    return _view(lowering, x, size)


def _flatten(lowering, x, start=0, end=-1) -> Value:
    size = lowering.size(need(x, "flatten"))
    start, end = start % len(size), end % len(size)
    return _reshape(lowering, x, [*size[:start], -1, *size[end + 1 :]])


def _unsqueeze(lowering, x, dim) -> Value:
    size = list(lowering.size(need(x, "unsqueeze")))
    size.insert(dim % (len(size) + 1), 1)
    return _view(lowering, x, size)


def _squeeze(lowering, x, dims) -> Value:
    size = lowering.size(need(x, "squeeze"))
    gone = {d % len(size) for d in ([dims] if isinstance(dims, int) else dims)}
    return _view(lowering, x, [s for i, s in enumerate(size) if i not in gone or s != 1])


def _permute(_lowering, x, dims) -> Value:
    x = need(x, "permute")
    return Value(x.tensor, tuple(x.axes[d] for d in dims))


def _transpose(lowering, x, a, b) -> Value:
    dims = list(range(len(need(x, "transpose").axes)))
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(lowering, x, dims)


def _matrix_transpose(lowering, x) -> Value:
    return _transpose(lowering, x, -2, -1)


def _contiguous(_lowering, x, memory_format=torch.contiguous_format) -> Value:
    """Outputs are written so, and between operations nobody sees a layout."""
    if memory_format != torch.contiguous_format:
        raise Unsupported(f"an output in {memory_format}")
    return need(x, "contiguous")


def _part(lowering: Lowering, x: Any, dim: int, first: int, count: int) -> Value:
    """`count` of x from `first` on, along an axis."""
    x = need(x, "a part", IMAGE, ("n", "h", "w", "c"), TOKENS, ROWS)
    axis, builder = x.axes[dim], lowering.builder
    n, h, w, c = lowering.shape(x)
    if count == lowering.size(x)[dim]:
        return x
    if axis == "c":
        y = builder.tensor((n, h, w, count))
        builder.copy(x.tensor, y, x_channel=first, channels=count)
    elif axis == "hw":
        y = builder.tensor((n, 1, count, c))
        builder.copy(x.tensor, y, x_pixel=first, pixels=count)
    elif axis in ("h", "w"):
        y = builder.tensor((n, count, w, c) if axis == "h" else (n, h, count, c))
        numbers = (-first, 0) if axis == "h" else (0, -first)
        builder.nodes.append(Node(native.PAD, x.tensor, y, numbers=numbers))
    else:
        raise Unsupported(f"a part along {axis}")
    return Value(y, x.axes)


def _slice(lowering, x, dim=0, start=None, end=None, step=1) -> Value:
    size = lowering.size(need(x, "a slice"))[dim]
    first, last, _ = slice(start, end).indices(size)
    if step != 1 or last <= first:
        raise Unsupported(f"a slice of {last - first} in steps of {step}")
    return _part(lowering, x, dim, first, last - first)


def _split_sizes(lowering, x, sizes, dim=0) -> list[Value]:
    parts, at = [], 0
    for size in sizes:
        parts.append(_part(lowering, x, dim, at, size))
        at += size
    return parts


def _split(lowering, x, size, dim=0) -> list[Value]:
    whole = lowering.size(need(x, "split"))[dim]
    return _split_sizes(lowering, x, [min(size, whole - at) for at in range(0, whole, size)], dim)


def _chunk(lowering, x, chunks, dim=0) -> list[Value]:
    whole = lowering.size(need(x, "chunk"))[dim]
    return _split(lowering, x, max(1, -(-whole // chunks)), dim)


def _getitem(_lowering, values, index) -> Value:
    return values[index]


def _select(lowering, x, dim, index) -> Value:
    x = need(x, "select", TOKENS)
    if dim % 3 != 1:
        raise Unsupported(f"select along axis {dim}")
    part = _part(lowering, x, dim, index % lowering.size(x)[1], 1)
    return Value(part.tensor, ROWS)


def _cat(lowering, parts, dim=0) -> Value:
    first = need(
        next(p for p in parts if isinstance(p, Value)), "cat", IMAGE, ("n", "h", "w", "c"), TOKENS, ROWS
    )
    axes, builder = first.axes, lowering.builder
    axis = axes[dim]
    if axis not in ("c", "hw"):
        raise Unsupported(f"cat along {axis}")
    n, h, w, c = lowering.shape(first)
    lengths = [
        (p.values.shape if isinstance(p, Constant) else lowering.size(need(p, "cat", axes)))[dim]
        for p in parts
    ]
    whole = sum(lengths)
    y, at = builder.tensor((n, h, w, whole) if axis == "c" else (n, 1, whole, c)), 0
    for part, length in zip(parts, lengths, strict=True):
        shape = (n, h, w, length) if axis == "c" else (n, 1, length, c)
        source = lowering.constant_like(part, axes, shape) if isinstance(part, Constant) else part
        builder.copy(source.tensor, y, **{"y_channel" if axis == "c" else "y_pixel": at})
        at += length
    return Value(y, axes)


def _resize(lowering: Lowering, x: Any, size: Any, scales: Any, mode: int) -> Value:
    x = need(x, "a change of size", IMAGE)
    n, h, w, c = lowering.shape(x)
    if size is None:
        size = [int(length * scale) for length, scale in zip((h, w), scales, strict=True)]
        if any(new != length * scale for new, length, scale in zip(size, (h, w), scales, strict=True)):
            raise Unsupported(f"a change of size by {scales}")  # PyTorch steps by the scale, not by the sizes
    y = lowering.builder.tensor((n, *size, c))
    return lowering.add(Node(native.RESIZE, x.tensor, y, numbers=(mode,)), IMAGE)


def _nearest(lowering, x, size=None, scales=None) -> Value:
    return _resize(lowering, x, size, scales, native.NEAREST)


def _bilinear(lowering, x, size=None, align_corners=False, scales=None) -> Value:
    return _resize(lowering, x, size, scales, native.BILINEAR_CORNERS if align_corners else native.BILINEAR)


def _pad(lowering, x, padding, mode="constant", value=None) -> Value:
    x = need(x, "a padding", IMAGE)
    left, right, above, below, *more = [*padding, 0, 0, 0, 0][: max(4, len(padding))]
    if mode != "constant" or len(more) > 2:
        raise Unsupported(f"a padding {list(padding)} of mode {mode}")
    n, h, w, c = lowering.shape(x)
    fill = 0.0 if value is None else float(value)
    if (left, right, above, below) != (0, 0, 0, 0):
        y = lowering.builder.tensor((n, h + above + below, w + left + right, c))
        x = lowering.add(Node(native.PAD, x.tensor, y, numbers=(above, left), f=fill), IMAGE)
    if any(more):  # channels
        before, after = more
        if before < 0 or after < 0:
            raise Unsupported("channels cut off by a padding")
        fills = [Constant(torch.full((1, count, 1, 1), fill)) for count in (before, after)]
        parts = [fills[0]] * bool(before) + [x] + [fills[1]] * bool(after)
        x = _cat(lowering, parts, 1)
    return x


def _identity(_lowering, x, **_) -> Value:
    return need(x, "a copy")


Rule = Callable[..., Any]
MODULES: dict[type, Rule] = {
    FusedConv2d: _conv,
    FusedLinear: _linear,
    FusedAttention: _attention,
}
_ATEN = torch.ops.aten
FUNCTIONS: dict[Any, Rule] = {
    _ATEN.layer_norm.default: _layer_norm,
    _ATEN.batch_norm.default: _batch_norm,
    _ATEN.group_norm.default: _group_norm,
    _ATEN.max_pool2d.default: _max_pool,
    _ATEN.avg_pool2d.default: _average_pool,
    _ATEN.adaptive_avg_pool2d.default: _average,
    _ATEN.mean.dim: _mean,
    _ATEN.add.Tensor: _add,
    _ATEN.sub.Tensor: _subtract,
    _ATEN.mul.Tensor: _multiply,
    _ATEN.div.Tensor: _divide,
    _ATEN.square.default: _square,
    _ATEN.relu.default: _activation("relu"),
    _ATEN.relu6.default: _activation("relu6"),
    _ATEN.silu.default: _activation("silu"),
    _ATEN.hardswish.default: _activation("hardswish"),
    _ATEN.sigmoid.default: _activation("sigmoid"),
    _ATEN.hardsigmoid.default: _activation("hardsigmoid"),
    _ATEN.tanh.default: _activation("tanh"),
    _ATEN.gelu.default: _gelu,
    _ATEN.leaky_relu.default: _leaky_relu,
    _ATEN.hardtanh.default: _hardtanh,
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
