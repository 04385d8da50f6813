"""The one oracle: every op in float64, written out, with how far a computation in a narrower type may be from it.

Each function returns (value, error), float64: the exact result, and a bound on |computed - exact| for each element. The
errors run along with the values: a sum of n products, rounded at each step with unit roundoff u, is off by at most
c * u * sqrt(n) * sum |x||w| (its rounding errors are independent; c = 8 leaves room for matrix units, which truncate),
what the operands themselves err by goes through |w|, an activation multiplies by its steepest slope, and a rounding to
the tested dtype adds half an epsilon of the value.

`sums` is the dtype that sums are held in: float32 in the kernels; None is the tested dtype, in which plain PyTorch
rounds after every step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.kernels.arguments import NO_TAIL, POINTWISE, Tail, ThreeLayers, TwoLayers, Window

# For each activation name of the schema, the function it stands for, written with torch alone.
ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": lambda z: z.clamp_min(0),
    "relu6": lambda z: z.clamp(0, 6),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
    "silu": lambda z: z * torch.sigmoid(z),
    "hardswish": lambda z: z * (z + 3).clamp(0, 6) / 6,
}
EXACT_ACTS = ("none", "relu", "relu6")  # integers stay integers
# No activation is steeper than hardswish at 3, so no error before it grows by more than this.
STEEPEST = 1.5

GUARD = 64  # NaN elements on either side of a guarded tensor


class Value(NamedTuple):
    """A float64 tensor, and a bound on what a computation of it may be off by."""

    value: Tensor
    error: Tensor


class Rounding(NamedTuple):
    """What rounds: results to `dtype`, steps of sums to a type of unit roundoff `u`."""

    dtype: torch.dtype
    u: float

    @classmethod
    def of(cls, x: Tensor, sums: torch.dtype | None) -> "Rounding":
        return cls(x.dtype, torch.finfo(sums or x.dtype).eps / 2)

    def relative(self, depth: int) -> float:
        """The error of a sum of `depth` products, as a fraction of the sum of their magnitudes."""
        return (8 * depth**0.5 + 16) * self.u

    def stored(self, a: Value) -> Value:
        """Rounded once to the tested dtype."""
        limits = torch.finfo(self.dtype)
        least = 16 * limits.smallest_normal * limits.eps
        return Value(a.value, a.error + limits.eps / 2 * (a.value.abs() + a.error) + least)


def _given(x: Tensor) -> Value:
    return Value(x.double(), torch.zeros((), dtype=torch.float64, device=x.device).expand(x.shape))


def _product(
    a: Value, weight: Tensor, multiply: Callable[..., Tensor], depth: int, rounding: Rounding
) -> Value:
    """multiply(a, weight), which is bilinear; each of its elements is a sum of `depth` products."""
    w = weight.double()
    error = multiply(a.error + rounding.relative(depth) * a.value.abs(), w.abs())
    return Value(multiply(a.value, w), error)


def _plus(a: Value, term: Tensor | None, rounding: Rounding) -> Value:
    if term is None:
        return a
    error = a.error + 16 * rounding.u * term.double().abs()
    return Value(a.value + term.double(), error)


def _activate(a: Value, act: str) -> Value:
    return Value(ACT[act](a.value), STEEPEST * a.error)


def finish(a: Value, tail: Tail, rounding: Rounding, channel_axis: int = 1) -> Value:
    """The tail: scale * act(a + bias + residual) + shift, rounded once."""
    shape = [1] * a.value.dim()
    shape[channel_axis] = -1
    bias, scale, shift = (
        None if t is None else t.double().view(shape) for t in (tail.bias, tail.scale, tail.shift)
    )
    a = _activate(_plus(_plus(a, bias, rounding), tail.residual, rounding), tail.act)
    if scale is not None:
        y = a.value * scale
        a = Value(y, a.error * scale.abs() + 2 * rounding.u * y.abs())
    if shift is not None:
        y = a.value + shift
        a = Value(y, a.error + 2 * rounding.u * (a.value.abs() + shift.abs()))
    return rounding.stored(a)


def layer_norm(a: Value, eps: float, axis: int, rounding: Rounding) -> Value:
    """LayerNorm without affine over one axis, written out.

    An error e of every input moves the normalised value by at most (2 + |value|) e / deviation: directly, through the
    mean, and through the deviation. Mean and variance themselves are sums of distances from about the mean.
    """
    centred = a.value - a.value.mean(axis, keepdim=True)
    deviation = (centred.square().mean(axis, keepdim=True) + eps).sqrt()
    value = centred / deviation
    largest, spread = (t.abs().amax(axis, keepdim=True) for t in (a.value, centred))
    own = rounding.relative(a.value.shape[axis]) * spread + 8 * rounding.u * largest
    error = (2 + value.abs()) * (a.error.amax(axis, keepdim=True) + own) / deviation
    return Value(value, error + 4 * rounding.u * value.abs())


def conv2d(
    x: Tensor,
    weight: Tensor,
    tail: Tail = NO_TAIL,
    window: Window = POINTWISE,
    norm_eps: float | None = None,
    *,
    sums: torch.dtype | None = None,
) -> Value:
    """`depthfuse.ops.conv2d`; a depthwise convolution is its case of C groups."""
    rounding = Rounding.of(x, sums)
    a = _convolved(_given(x), weight, window, rounding)
    if norm_eps is None:
        return finish(a, tail, rounding)
    bias = None if tail.bias is None else tail.bias.view(-1, 1, 1)
    a = layer_norm(_plus(a, bias, rounding), norm_eps, 1, rounding)
    return finish(a, tail._replace(bias=None), rounding)


def _convolved(a: Value, weight: Tensor, window: Window, rounding: Rounding) -> Value:
    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, *window)

    return _product(a, weight, convolve, weight[0].numel(), rounding)


def linear(
    x: Tensor,
    weight: Tensor,
    tail: Tail = NO_TAIL,
    norm_eps: float | None = None,
    *,
    sums: torch.dtype | None = None,
) -> Value:
    """`depthfuse.ops.linear`."""
    rounding = Rounding.of(x, sums)
    return _linear(_given(x), weight, tail, norm_eps, rounding)


def _linear(a: Value, weight: Tensor, tail: Tail, norm_eps: float | None, rounding: Rounding) -> Value:
    if norm_eps is not None:
        a = rounding.stored(layer_norm(a, norm_eps, -1, rounding))
    a = _product(a, weight, lambda x, w: x @ w.T, weight.shape[1], rounding)
    return finish(a, tail, rounding, channel_axis=-1)


def mlp(
    x: Tensor,
    weights: TwoLayers,
    tail: Tail = NO_TAIL,
    act_inner: str = "none",
    norm_eps: float | None = None,
    *,
    sums: torch.dtype | None = None,
) -> Value:
    """`depthfuse.ops.mlp`, the hidden values stored in the tested dtype."""
    rounding = Rounding.of(x, sums)
    hidden = _linear(_given(x), weights.w1, Tail(weights.b1, act=act_inner), norm_eps, rounding)
    return _linear(hidden, weights.w2, tail, None, rounding)


def depthwise_pointwise(
    x: Tensor,
    weights: TwoLayers,
    tail: Tail = NO_TAIL,
    window: Window = POINTWISE,
    act_inner: str = "none",
    *,
    sums: torch.dtype | None = None,
) -> Value:
    """`depthfuse.ops.depthwise_pointwise`, the filtered tensor stored in the tested dtype."""
    rounding = Rounding.of(x, sums)
    a = _convolved(_given(x), weights.w1, window._replace(groups=x.shape[1]), rounding)
    a = finish(a, Tail(weights.b1, act=act_inner), rounding)
    return finish(_convolved(a, weights.w2, POINTWISE, rounding), tail, rounding)


def inverted_residual(
    x: Tensor,
    weights: ThreeLayers,
    tail: Tail = NO_TAIL,
    stride: int = 1,
    act_inner: str = "relu6",
    *,
    sums: torch.dtype | None = None,
) -> Value:
    """`depthfuse.ops.inverted_residual`, what lies between its layers stored in the tested dtype."""
    rounding = Rounding.of(x, sums)
    w1, b1, w2, b2, w3 = weights
    padding = w2.shape[-1] // 2
    window = Window((stride, stride), (padding, padding), groups=len(w2))
    a = finish(_convolved(_given(x), w1, POINTWISE, rounding), Tail(b1, act=act_inner), rounding)
    a = finish(_convolved(a, w2, window, rounding), Tail(b2, act=act_inner), rounding)
    return finish(_convolved(a, w3, POINTWISE, rounding), tail, rounding)


def pool_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_eps: float | None = None,
    *,
    sums: torch.dtype | None = None,
) -> Value:
    """`depthfuse.ops.pool_linear`, the means stored in the tested dtype."""
    rounding = Rounding.of(x, sums)
    exact = x.double()
    error = rounding.relative(x.shape[2] * x.shape[3]) * exact.abs().mean((2, 3))
    mean = rounding.stored(Value(exact.mean((2, 3)), error))
    return _linear(mean, weight, Tail(bias), norm_eps, rounding)


def attention(
    qkv: Tensor, heads: int, scale: float | None = None, *, sums: torch.dtype | None = None
) -> Value:
    """`depthfuse.ops.attention`, written out head by head.

    Scores off by at most e move each weight by that fraction of itself twice (numerator and sum); weights are stored in
    the tested dtype; and their sum over the values errs as any sum of N products.
    """
    rounding = Rounding.of(qkv, sums)
    batch, tokens, width = qkv.shape
    dim = width // (3 * heads)
    scale = dim**-0.5 if scale is None else scale
    value = torch.empty(batch, tokens, heads, dim, dtype=torch.float64, device=qkv.device)
    error = torch.empty_like(value)
    parts = qkv.double().reshape(batch, tokens, 3, heads, dim)
    stored = torch.finfo(qkv.dtype).eps
    for b in range(batch):
        for h in range(heads):
            q, k, v = (parts[b, :, i, h] for i in range(3))
            weights = torch.softmax(q @ k.T * scale, dim=-1)
            off = (rounding.relative(dim) * (q.abs() @ k.abs().T) * abs(scale)).amax(-1, keepdim=True)
            value[b, :, h] = weights @ v
            error[b, :, h] = (weights @ v.abs()) * (torch.expm1(2 * off) + stored + rounding.relative(tokens))
    return rounding.stored(Value(value.flatten(2), error.flatten(2)))


def assert_within(computed: Tensor, value: Tensor, error: Tensor) -> None:
    """|computed - value| <= error for every element; NaN counts as wrong."""
    assert computed.shape == value.shape
    if value.numel():
        worst = ((computed.double() - value).abs() / error).nan_to_num(nan=float("inf")).max().item()
        assert worst <= 1, f"the error is {worst:.3g} times its bound"


def integers(shape, dtype, largest: int = 1) -> Tensor:
    """Integers of at most `largest` in magnitude: sums of few of them are exact in every dtype."""
    return torch.randint(-largest, largest + 1, shape).to(dtype)


def guarded(tensor: Tensor, offset: int = GUARD) -> Tensor:
    """A copy of `tensor`, same strides, between two bands of NaN: any read past its ends shows in the result."""
    buffer = torch.full(
        (tensor.numel() + offset + GUARD,), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    copy = buffer[offset : offset + tensor.numel()].as_strided(tensor.shape, tensor.stride(), offset)
    return copy.copy_(tensor)
