"""How each operation of a plan's graph becomes nodes of the native engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from depthfuse.acceleration.running.native_moves import MOVES
from depthfuse.acceleration.running.native_values import (
    FLAT,
    IMAGE,
    ROWS,
    TOKENS,
    Constant,
    Draft,
    Unsupported,
    Value,
    need,
)
from depthfuse.fused.blocks import FusedAttention
from depthfuse.fused.layers import FusedConv2d, FusedLinear
from depthfuse.kernels.arguments import Window
from depthfuse.native import plan as native
from depthfuse.native.plan import Node

# Products.


def _tail(module: FusedConv2d | FusedLinear) -> dict[str, Any]:
    tensors = module.tensors()
    return {"act": module.act, **{name: tensors[name] for name in ("bias", "scale", "shift")}}


def _residual(draft: Draft, residual: Any, like: Value) -> int:
    if residual is None:
        return -1
    residual = need(residual, "a residual", like.axes)
    if draft.shape(residual) != draft.shape(like):
        raise Unsupported("a residual that is broadcast")
    return residual.tensor


def _conv(draft: Draft, module: FusedConv2d, x: Any, residual: Any = None) -> Value:
    x = need(x, "a convolution", IMAGE)
    config, weight, builder = module.config(), module.weight, draft.builder
    n, h, w, c = draft.shape(x)
    filters, group_channels, *kernel = weight.shape
    stride, padding, dilation = (tuple(config[name]) for name in ("stride", "padding", "dilation"))
    if config.get("norm_eps") is not None:
        raise Unsupported("a convolution with a norm")
    size = Window(stride, padding, dilation).output_size((h, w), kernel)
    y = Value(builder.tensor((n, *size, filters)), IMAGE)
    builder.pad(x.tensor, max(padding))
    common = {"x2": _residual(draft, residual, y), **_tail(module)}
    numbers = (*kernel, *stride, *padding, *dilation)
    groups = config["groups"]
    if groups == filters == c and group_channels == 1:
        taps = weight.permute(2, 3, 1, 0)
        return draft.add(
            Node(native.DEPTHWISE, x.tensor, y.tensor, numbers=numbers, weight=taps, **common), IMAGE
        )
    algorithm = draft.algorithms((n, h, w, c), filters, numbers) if groups == 1 else native.DIRECT
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
    return draft.add(node, IMAGE)


def _linear(draft: Draft, module: FusedLinear, x: Any, residual: Any = None) -> Value:
    x = need(x, "a linear layer")
    if (x.axes[-1] != "c" and x.axes != FLAT) or module.config().get("norm_eps") is not None:
        raise Unsupported(f"a linear layer over {x.axes}")
    builder = draft.builder
    if x.axes == FLAT:  # a convolution by a kernel as large as the image
        n, h, w, c = draft.shape(x)
        y = Value(builder.tensor((n, 1, 1, module.weight.shape[0])), ROWS)
        taps = module.weight.view(-1, c, h, w).permute(0, 2, 3, 1)
        return _product(draft, module, x, y, (h, w, 1, 1, 0, 0, 1, 1), taps, residual)
    y = Value(builder.tensor((*draft.shape(x)[:3], module.weight.shape[0])), x.axes)
    return _product(draft, module, x, y, (1, 1, 1, 1, 0, 0, 1, 1), module.weight, residual)


def _product(
    draft: Draft,
    module: FusedLinear,
    x: Value,
    y: Value,
    numbers: tuple[int, ...],
    weight: Tensor,
    residual: Any,
) -> Value:
    """A linear layer as a convolution."""
    algorithm = draft.algorithms(draft.shape(x), draft.shape(y)[3], numbers)
    common = {"x2": _residual(draft, residual, y), "algorithm": algorithm, **_tail(module)}
    return draft.add(Node(native.CONV, x.tensor, y.tensor, numbers=numbers, weight=weight, **common), y.axes)


# Of six products in the place of one, where softmax needs them in parts, too: 1.2 times as fast at 197 tokens of 64
# channels, no faster at 64, slower at 49. One product of bfloat16 always is: 1.4 to 2.7 times.
_ENOUGH_TOKENS = 128


def _attention(draft: Draft, module: FusedAttention, x: Any) -> Value:
    x = need(x, "attention", TOKENS)
    config, builder = module.config(), draft.builder
    *pixels, channels = draft.shape(x)
    y = builder.tensor((*pixels, channels // 3))
    scale = config["scale"] or (channels // 3 // config["heads"]) ** -0.5
    enough = draft.tiles == native.TILES_BF16 or pixels[-1] >= _ENOUGH_TOKENS
    algorithm = draft.tiles if enough else native.DIRECT
    node = Node(native.ATTENTION, x.tensor, y, algorithm=algorithm, numbers=(config["heads"],), f=scale)
    return draft.add(node, x.axes)


# Norms and pools.


def _layer_norm(draft, x, shape, weight=None, bias=None, eps=1e-5, *_) -> Value:
    x = need(x, "a layer norm")
    if x.axes[-1] != "c" or list(shape) != [draft.shape(x)[3]]:
        raise Unsupported(f"a layer norm over {shape} of {x.axes}")
    affine = {}
    for name, values in (("weight", weight), ("bias", bias)):
        if isinstance(values, Value):
            raise Unsupported("a layer norm whose affine depends on the input")
        affine[name] = None if values is None else values.values
    y = draft.builder.tensor(draft.shape(x))
    return draft.add(Node(native.LAYER_NORM, x.tensor, y, f=eps, **affine), x.axes)


def _batch_norm(draft, x, weight, bias, mean, variance, training, momentum, eps, *_) -> Value:
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
    return _map(draft, x, scale.float(), shift.float())


def _group_norm(draft, x, groups, weight=None, bias=None, eps=1e-5, *_) -> Value:
    x = need(x, "a group norm", IMAGE)
    if isinstance(weight, Value) or isinstance(bias, Value):
        raise Unsupported("a group norm whose affine depends on the input")
    affine = {"weight": weight and weight.values, "bias": bias and bias.values}
    y = draft.builder.tensor(draft.shape(x))
    return draft.add(Node(native.GROUP_NORM, x.tensor, y, numbers=(groups,), f=eps, **affine), IMAGE)


def _window_of_pool(draft, x, kernel, stride, padding, dilation, ceil) -> tuple[Value, tuple[int, ...]]:
    """(The output, the numbers of the window); a last window that starts beyond the image is none, as in PyTorch."""
    kernel, stride, padding, dilation = (
        (p * 2)[:2] for p in (list(kernel), list(stride) or list(kernel), list(padding), list(dilation))
    )
    n, h, w, c = draft.shape(x)
    size = list(Window(stride, padding, dilation).output_size((h, w), kernel))
    if ceil:
        for i, length in enumerate((h, w)):
            room = length + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
            more = room % stride[i] and size[i] * stride[i] < length + padding[i]
            size[i] += bool(more)
    y = Value(draft.builder.tensor((n, *size, c)), IMAGE)
    return y, (*kernel, *stride, *padding, *dilation)


def _max_pool(draft, x, kernel, stride=(), padding=(0,), dilation=(1,), ceil=False) -> Value:
    x = need(x, "a pool", IMAGE)
    y, window = _window_of_pool(draft, x, kernel, stride, padding, dilation, ceil)
    numbers = (*window, 0, int(ceil))
    return draft.add(Node(native.MAX_POOL, x.tensor, y.tensor, numbers=numbers), IMAGE)


def _average_pool(draft, x, kernel, stride=(), padding=(0,), ceil=False, padded=True, divisor=None) -> Value:
    x = need(x, "a pool", IMAGE)
    if divisor is not None:
        raise Unsupported(f"a pool that divides by {divisor}")
    y, window = _window_of_pool(draft, x, kernel, stride, padding, (1,), ceil)
    numbers = (*window, int(padded), int(ceil))
    return draft.add(Node(native.AVERAGE_POOL, x.tensor, y.tensor, numbers=numbers), IMAGE)


def _average(draft, x, size) -> Value:
    x = need(x, "a pool", IMAGE)
    if list(size) != [1, 1]:
        raise Unsupported(f"a pool to {size}")
    n, _, _, c = draft.shape(x)
    return draft.add(Node(native.MEAN, x.tensor, draft.builder.tensor((n, 1, 1, c))), IMAGE)


def _mean(draft, x, dims=None, keepdim=False) -> Value:
    x = need(x, "a mean")
    reduced = {x.axes[d] for d in dims} if dims else set(x.axes)
    if "".join(sorted("".join(reduced))) != "hw":
        raise Unsupported(f"a mean over {reduced}")
    n, _, _, c = draft.shape(x)
    axes = x.axes if keepdim else tuple(a for a in x.axes if a not in reduced)
    return draft.add(Node(native.MEAN, x.tensor, draft.builder.tensor((n, 1, 1, c))), axes)


# Value by value.


def _map(draft: Draft, x: Value, weight: Tensor | None = None, bias: Tensor | None = None) -> Value:
    """weight * x + bias, both [c]."""
    y = draft.builder.tensor(draft.shape(x))
    return draft.add(Node(native.MAP, x.tensor, y, weight=weight, bias=bias), x.axes)


def _combine(draft: Draft, op: int, a: Any, b: Any) -> Value:
    """A sum or a product of two values, of which one may be broadcast, or of a value and a constant."""
    value, other = (a, b) if isinstance(a, Value) else (b, a)
    if not isinstance(other, Value):
        channels = draft.constant_of_channels(other, value.axes, draft.shape(value))
        if channels is not None:
            return _map(draft, value, **{"bias" if op == native.ADD else "weight": channels})
        other = draft.constant_like(other, value.axes, draft.shape(value))
    other = need(other, "an operand", value.axes)
    shapes = [draft.shape(value), draft.shape(other)]
    whole = tuple(map(max, *shapes))
    if shapes[0] != whole:
        value, other = other, value
        shapes.reverse()
    if shapes[0] != whole or any(s not in (1, t) for s, t in zip(shapes[1], whole, strict=True)):
        raise Unsupported("two operands that are both broadcast")
    y = draft.builder.tensor(whole)
    return draft.add(Node(op, value.tensor, y, x2=other.tensor), value.axes)


def _add(draft, a, b) -> Value:
    return _combine(draft, native.ADD, a, b)


def _multiply(draft, a, b) -> Value:
    return _combine(draft, native.MULTIPLY, a, b)


def _square(draft, x) -> Value:
    return _combine(draft, native.MULTIPLY, x, x)


def _subtract(draft, a, b) -> Value:
    if not isinstance(a, Value) or isinstance(b, Value):
        raise Unsupported("a difference of values")
    return _combine(draft, native.ADD, a, Constant(-b.values) if isinstance(b, Constant) else -b)


def _divide(draft, a, b) -> Value:
    if not isinstance(a, Value) or isinstance(b, Value):
        raise Unsupported("a quotient of values")
    return _combine(draft, native.MULTIPLY, a, Constant(1 / b.values) if isinstance(b, Constant) else 1 / b)


def _activation(name: str) -> Callable[..., Value]:
    return lambda draft, x: _activate(draft, x, name)


def _activate(draft: Draft, x: Any, act: str, slope: float = 0.0) -> Value:
    x = need(x, "an activation")
    if draft.activate_in_place(act, slope):
        return x
    y = draft.builder.tensor(draft.shape(x))
    return draft.add(Node(native.MAP, x.tensor, y, act=act, f=slope), x.axes)


def _gelu(draft, x, approximate="none") -> Value:
    return _activate(draft, x, "gelu_tanh" if approximate == "tanh" else "gelu")


def _leaky_relu(draft, x, negative_slope=0.01) -> Value:
    return _activate(draft, x, "leaky_relu", negative_slope)


def _hardtanh(draft, x, low=-1.0, high=1.0) -> Value:
    if (low, high) != (0, 6):
        raise Unsupported(f"a clamp to {low} and {high}")
    return _activate(draft, x, "relu6")


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
    **MOVES,
}
