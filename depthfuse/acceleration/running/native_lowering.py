"""From a plan's graph to a plan of the native engine: each operation's rule.

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
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from depthfuse.fused.blocks import FusedAttention
from depthfuse.fused.layers import FusedConv2d, FusedLinear
from depthfuse.kernels.arguments import Window
from depthfuse.native import plan as native
from depthfuse.native.plan import Builder, Node

Axes = tuple[str, ...]
IMAGE: Axes = ("n", "c", "h", "w")
TOKENS: Axes = ("n", "hw", "c")
# (input [n, h, w, c], filters, padding) -> how to compute a 3x3 convolution of stride 1
Algorithms = Callable[[Sequence[int], int, int], int]


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


class Lowering(fx.Interpreter):
    """Walks the graph with values of the engine in the place of tensors."""

    def __init__(self, graph: fx.GraphModule, algorithms: Algorithms) -> None:
        super().__init__(graph)
        self.builder, self.algorithms = Builder(), algorithms

    def lower(self, inputs: Sequence[Tensor]) -> tuple[list[tuple[int, ...]], bool]:
        """Fill `builder` for inputs of these shapes: (shapes of the outputs, whether there is one outside a tuple).

        Raises Unsupported.
        """
        given = [self._input(x) for x in inputs]
        result = self.run(*given, enable_io_processing=False)
        single = isinstance(result, Value)
        values = [result] if single else list(result)
        tensors = [value.tensor for value in (*given, *values) if isinstance(value, Value)]
        if len(set(tensors)) < len(tensors):
            raise Unsupported("an output that shares its memory with an input or another output")
        return [self._output(value) for value in values], single

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("placeholder", "get_attr", "call_module", "call_function", "output"):
            raise Unsupported(f"{n.op} {n.target}")
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return Constant(super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Value:
        module = self.fetch_attr(target)
        lower = _MODULES.get(type(module))
        if lower is None or kwargs:
            raise Unsupported(f"{type(module).__name__} {target}")
        return lower(self, module, *args)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not any(isinstance(a, Value) for a in tree_leaves(args)):
            return self._constant(target, args, kwargs)
        lower = _FUNCTIONS.get(target)
        if lower is None or (kwargs and lower is not _contiguous):
            raise Unsupported(str(target))
        return lower(self, *args, **kwargs)

    # Tensors of the engine.

    def _input(self, x: Tensor) -> Value:
        if x.dim() == 4:
            n, c, h, w = x.shape
            source = self.builder.tensor((n, h, w, c), native.INPUT)
            y = self.builder.tensor((n, h, w, c))
            self.builder.nodes.append(Node(native.FROM_PLANES, source, y))
            return Value(y, IMAGE)
        if x.dim() in (2, 3):
            shape = (x.shape[0], 1, math.prod(x.shape[1:-1]), x.shape[-1])
            source, y = self.builder.tensor(shape, native.INPUT), self.builder.tensor(shape)
            self.builder.nodes.append(Node(native.COPY, source, y, numbers=(0,)))
            return Value(y, ("n", "c") if x.dim() == 2 else TOKENS)
        raise Unsupported(f"an input of {x.dim()} axes")

    def _output(self, value: Any) -> tuple[int, ...]:
        """The shape that PyTorch sees of a result, which is copied out of the arena."""
        if not isinstance(value, Value):
            raise Unsupported("an output that does not depend on the input")
        shape = self.builder.shape(value.tensor)
        y = self.builder.tensor(shape, native.OUTPUT)
        if value.axes[-1] == "c":
            self.builder.nodes.append(Node(native.COPY, value.tensor, y, numbers=(0,)))
        elif value.axes == IMAGE:
            self.builder.nodes.append(Node(native.TO_PLANES, value.tensor, y))
        else:
            raise Unsupported(f"an output with the axes {value.axes}")
        return self.size(value)

    def size(self, value: Value) -> tuple[int, ...]:
        """The shape that PyTorch sees."""
        return _seen(value.axes, self.builder.shape(value.tensor))

    def add(self, node: Node, axes: Axes) -> Value:
        self.builder.nodes.append(node)
        return Value(node.y, axes)

    def _constant(self, target: Any, args: Any, kwargs: Any) -> Any:
        plain = fx.node.map_aggregate(args, lambda a: a.values if isinstance(a, Constant) else a)
        result = target(*plain, **kwargs)
        return Constant(result) if isinstance(result, Tensor) else result

    def constant_like(self, constant: Constant, axes: Axes, shape: Sequence[int]) -> Value:
        """A constant, broadcast to a value's shape: [h, w, c] of it, the same for each image."""
        try:
            seen = torch.broadcast_to(constant.values, _seen(axes, shape))
        except RuntimeError as error:
            raise Unsupported(f"a constant of {list(constant.values.shape)} with the axes {axes}") from error
        if axes[0] != "n" or axes[-1] != "c" or (shape[0] > 1 and not (seen == seen[:1]).all()):
            raise Unsupported("a constant that is not the same for each image")
        y = self.builder.tensor(shape)
        return self.add(Node(native.CONSTANT, -1, y, weight=seen[0].contiguous()), axes)


def _seen(axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that PyTorch sees of [n, h, w, c]."""
    sizes = dict(zip("nhwc", shape, strict=True))
    return tuple(math.prod(sizes[name] for name in axis) for axis in axes)


def _need(value: Any, what: str, *axes: Axes) -> Value:
    if not isinstance(value, Value) or (axes and value.axes not in axes):
        raise Unsupported(f"{what} of {getattr(value, 'axes', value)}")
    return value


def _tail(module: FusedConv2d | FusedLinear) -> dict[str, Any]:
    tensors = module.tensors()
    return {"act": module.act, **{name: tensors[name] for name in ("bias", "scale", "shift")}}


def _residual(lowering: Lowering, residual: Any, like: Value) -> int:
    if residual is None:
        return -1
    residual = _need(residual, "a residual", like.axes)
    if lowering.builder.shape(residual.tensor) != lowering.builder.shape(like.tensor):
        raise Unsupported("a residual that is broadcast")
    return residual.tensor


def _conv(lowering: Lowering, module: FusedConv2d, x: Any, residual: Any = None) -> Value:
    x = _need(x, "a convolution", IMAGE)
    config, weight, builder = module.config(), module.weight, lowering.builder
    n, h, w, c = builder.shape(x.tensor)
    filters, group_channels, *kernel = weight.shape
    stride, padding, dilation = (tuple(config[name]) for name in ("stride", "padding", "dilation"))
    if config.get("norm_eps") is not None:
        raise Unsupported("a convolution with a norm")
    size = Window(stride, padding, dilation).output_size((h, w), kernel)
    y = Value(builder.tensor((n, *size, filters)), IMAGE)
    builder.pad(x.tensor, max(padding))
    common = {"x2": _residual(lowering, residual, y), **_tail(module)}
    numbers = (*kernel, *stride, *padding, *dilation)
    if config["groups"] == filters == c and group_channels == 1:
        taps = weight.permute(2, 3, 1, 0)
        return lowering.add(
            Node(native.DEPTHWISE, x.tensor, y.tensor, numbers=numbers, weight=taps, **common), IMAGE
        )
    if config["groups"] != 1:
        raise Unsupported(f"a convolution of {config['groups']} groups")
    square = numbers == (3, 3, 1, 1, padding[0], padding[0], 1, 1)
    algorithm = lowering.algorithms((n, h, w, c), filters, padding[0]) if square else native.DIRECT
    taps = weight.permute(0, 2, 3, 1)
    node = Node(native.CONV, x.tensor, y.tensor, algorithm=algorithm, numbers=numbers, weight=taps, **common)
    return lowering.add(node, IMAGE)


def _linear(lowering: Lowering, module: FusedLinear, x: Any, residual: Any = None) -> Value:
    x = _need(x, "a linear layer")
    if x.axes[-1] != "c" or module.config().get("norm_eps") is not None:
        raise Unsupported(f"a linear layer over {x.axes}")
    builder = lowering.builder
    y = Value(builder.tensor((*builder.shape(x.tensor)[:3], module.weight.shape[0])), x.axes)
    common = {"x2": _residual(lowering, residual, y), **_tail(module)}
    numbers = (1, 1, 1, 1, 0, 0, 1, 1)
    return lowering.add(
        Node(native.CONV, x.tensor, y.tensor, numbers=numbers, weight=module.weight, **common), x.axes
    )


def _attention(lowering: Lowering, module: FusedAttention, x: Any) -> Value:
    x = _need(x, "attention", TOKENS)
    config, builder = module.config(), lowering.builder
    *pixels, channels = builder.shape(x.tensor)
    y = builder.tensor((*pixels, channels // 3))
    scale = config["scale"] or (channels // 3 // config["heads"]) ** -0.5
    return lowering.add(Node(native.ATTENTION, x.tensor, y, numbers=(config["heads"],), f=scale), x.axes)


def _layer_norm(lowering, x, shape, weight=None, bias=None, eps=1e-5, *_) -> Value:
    x = _need(x, "a layer norm")
    if x.axes[-1] != "c" or list(shape) != [lowering.builder.shape(x.tensor)[3]]:
        raise Unsupported(f"a layer norm over {shape} of {x.axes}")
    affine = {}
    for name, values in (("weight", weight), ("bias", bias)):
        if isinstance(values, Value):
            raise Unsupported("a layer norm whose affine depends on the input")
        affine[name] = None if values is None else values.values
    y = lowering.builder.tensor(lowering.builder.shape(x.tensor))
    return lowering.add(Node(native.LAYER_NORM, x.tensor, y, f=eps, **affine), x.axes)


def _max_pool(lowering, x, kernel, stride=(), padding=(0,), dilation=(1,), ceil=False) -> Value:
    x = _need(x, "a pool", IMAGE)
    kernel, stride, padding, dilation = (
        (p * 2)[:2] for p in (list(kernel), list(stride) or list(kernel), list(padding), list(dilation))
    )
    n, h, w, c = lowering.builder.shape(x.tensor)
    if ceil:
        raise Unsupported("a pool that rounds up")
    size = Window(stride, padding, dilation).output_size((h, w), kernel)
    y = lowering.builder.tensor((n, *size, c))
    return lowering.add(
        Node(native.MAX_POOL, x.tensor, y, numbers=(*kernel, *stride, *padding, *dilation)), IMAGE
    )


def _sym_size(lowering, x, dim) -> int:
    return lowering.size(_need(x, "a size"))[dim]


def _average(lowering, x, size) -> Value:
    x = _need(x, "a pool", IMAGE)
    if list(size) != [1, 1]:
        raise Unsupported(f"a pool to {size}")
    n, _, _, c = lowering.builder.shape(x.tensor)
    return lowering.add(Node(native.MEAN, x.tensor, lowering.builder.tensor((n, 1, 1, c))), IMAGE)


def _mean(lowering, x, dims=None, keepdim=False, **_) -> Value:
    x = _need(x, "a mean")
    reduced = {x.axes[d] for d in dims} if dims else set(x.axes)
    if "".join(sorted("".join(reduced))) != "hw":
        raise Unsupported(f"a mean over {reduced}")
    n, _, _, c = lowering.builder.shape(x.tensor)
    axes = x.axes if keepdim else tuple(a for a in x.axes if a not in reduced)
    return lowering.add(Node(native.MEAN, x.tensor, lowering.builder.tensor((n, 1, 1, c))), axes)


def _flatten(lowering, x, start=0, end=-1) -> Value:
    x = _need(x, "flatten")
    end = end % len(x.axes)
    joined = x.axes[start : end + 1]
    sizes = dict(zip("nhwc", lowering.builder.shape(x.tensor), strict=True))
    # Axes of size 1 may stand anywhere; the others must follow each other in memory.
    large = [name for axis in joined for name in axis if sizes[name] > 1]
    if large != sorted(large, key="nhwc".index) or not "nhwc".find("".join(large)) >= 0:
        raise Unsupported(f"flatten of {joined}")
    names = "".join(name for name in "nhwc" if any(name in axis for axis in joined))
    return Value(x.tensor, (*x.axes[:start], _tidy(names, sizes), *x.axes[end + 1 :]))


def _tidy(names: str, sizes: dict[str, int]) -> str:
    """An axis by its name where it is one that is not 1 and others that are: "c" for "hwc" of [n, 1, 1, c]."""
    large = "".join(name for name in names if sizes[name] > 1)
    return large if len(large) == 1 and large in ("n", "c") else names


def _permute(_lowering, x, order) -> Value:
    x = _need(x, "permute")
    return Value(x.tensor, tuple(x.axes[d] for d in order))


def _contiguous(_lowering, x, memory_format=torch.contiguous_format) -> Value:
    """Outputs are written so, and between operations nobody sees a layout."""
    if memory_format != torch.contiguous_format:
        raise Unsupported(f"an output in {memory_format}")
    return _need(x, "contiguous")


def _transpose(lowering, x, a, b) -> Value:
    order = list(range(len(_need(x, "transpose").axes)))
    order[a], order[b] = order[b], order[a]
    return _permute(lowering, x, order)


def _select(lowering, x, dim, index) -> Value:
    x = _need(x, "select", TOKENS)
    n, h, w, c = lowering.builder.shape(x.tensor)
    if dim % 3 != 1:
        raise Unsupported(f"select along axis {dim}")
    y = lowering.builder.tensor((n, 1, 1, c))
    return lowering.add(Node(native.SELECT, x.tensor, y, numbers=(index % (h * w),)), ("n", "c"))


def _cat(lowering, parts, dim=0) -> Value:
    values = [p for p in parts if isinstance(p, Value)]
    first = _need(values[0], "cat", TOKENS)
    if dim % 3 != 1 or any(v.axes != first.axes for v in values):
        raise Unsupported(f"cat along axis {dim} of {first.axes}")
    n, _, _, c = lowering.builder.shape(first.tensor)
    lengths = [p.values.shape[1] if isinstance(p, Constant) else lowering.size(p)[1] for p in parts]
    y, at = lowering.builder.tensor((n, 1, sum(lengths), c)), 0
    for part, length in zip(parts, lengths, strict=True):
        source = (
            lowering.constant_like(part, first.axes, (n, 1, length, c))
            if isinstance(part, Constant)
            else part
        )
        lowering.builder.nodes.append(Node(native.COPY, source.tensor, y, numbers=(at,)))
        at += length
    return Value(y, first.axes)


def _add(lowering, a, b) -> Value:
    value, other = (a, b) if isinstance(a, Value) else (b, a)
    shape = lowering.builder.shape(value.tensor)
    if isinstance(other, Constant):
        other = lowering.constant_like(other, value.axes, shape)
    other = _need(other, "a sum", value.axes)
    if lowering.builder.shape(other.tensor) != shape:
        raise Unsupported("a sum that is broadcast")
    return lowering.add(
        Node(native.ADD, value.tensor, lowering.builder.tensor(shape), x2=other.tensor), value.axes
    )


_MODULES: dict[type, Callable[..., Value]] = {
    FusedConv2d: _conv,
    FusedLinear: _linear,
    FusedAttention: _attention,
}
_ATEN = torch.ops.aten
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _ATEN.layer_norm.default: _layer_norm,
    _ATEN.max_pool2d.default: _max_pool,
    _ATEN.adaptive_avg_pool2d.default: _average,
    _ATEN.mean.dim: _mean,
    _ATEN.flatten.using_ints: _flatten,
    _ATEN.contiguous.default: _contiguous,
    _ATEN.permute.default: _permute,
    _ATEN.transpose.int: _transpose,
    _ATEN.select.int: _select,
    _ATEN.cat.default: _cat,
    _ATEN.add.Tensor: _add,
    _ATEN.sym_size.int: _sym_size,
}
