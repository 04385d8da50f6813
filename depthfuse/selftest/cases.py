"""What the self-test runs: each op at a few shapes, beside its float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from depthfuse import ops
from depthfuse.kernels.arguments import Tail, ThreeLayers, TwoLayers, Window
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import Value

_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Sample:
    """Draws operands.

    integers: small ones, few of them other than 0, of which all sums are exact; else standard normal values. small:
    shapes of which each costs an interpreter little.
    """

    device: torch.device
    dtype: torch.dtype
    integers: bool
    small: bool

    def __call__(self, *shape: int) -> Tensor:
        if self.integers:
            values = (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).float()
        else:
            values = torch.randn(shape)
        return values.to(self.device, self.dtype)

    def image(self, *shape: int) -> Tensor:
        return self(*shape).contiguous(memory_format=torch.channels_last)

    def tail(self, channels: int, residual: Tensor, act: str = "relu") -> Tail:
        return Tail(self(channels), residual, self(channels), self(channels), act)

    def pick(self, small: int, usual: int) -> int:
        return small if self.small else usual


Outcome = tuple[Tensor, Value]  # what was computed, and what it should be
SUMS = torch.float32  # the dtype that kernels hold sums in


@dataclass(frozen=True)
class Case:
    """An op at a shape. run: (operands' source, backend, dtype of sums) -> outcome. exact: whether integers come out
    exact, as they do where nothing is divided.
    """

    op: str
    name: str
    run: Callable[[Sample, str, torch.dtype | None], Outcome]
    exact: bool = True
    real: bool = True


def _conv2d(
    channels: tuple[int, int], filters: tuple[int, int], kernel: int, stride: int, groups: tuple[int, int] = (1, 1),
    norm: bool = False,
) -> Callable[[Sample, str, torch.dtype | None], Outcome]:  # fmt: skip
    def run(sample: Sample, backend: str, sums: torch.dtype | None) -> Outcome:
        c, k, g = (sample.pick(*pair) for pair in (channels, filters, groups))
        side = sample.pick(5, 15)
        x, weight = sample.image(2, c, side, side + 2), sample.image(k, c // g, kernel, kernel)
        window = Window((stride, stride), (kernel // 2, kernel // 2), groups=g)
        out = [(extent - 1) // stride + 1 for extent in (side, side + 2)]
        tail = sample.tail(k, sample.image(2, k, *out))
        eps = _NORM_EPS if norm else None
        y = ops.conv2d(
            x, weight, *tail[:4], stride=stride, padding=kernel // 2, groups=g, act=tail.act, norm_eps=eps,
            backend=backend,
        )  # fmt: skip
        return y, oracle.conv2d(x, weight, tail, window, eps, sums=sums)

    return run


def _linear(rows: tuple[int, int], inputs: tuple[int, int], outputs: tuple[int, int], norm: bool = False):
    def run(sample: Sample, backend: str, sums: torch.dtype | None) -> Outcome:
        r, c, k = (sample.pick(*pair) for pair in (rows, inputs, outputs))
        x, weight, tail = sample(r, c), sample(k, c), sample.tail(k, sample(r, k))
        eps = _NORM_EPS if norm else None
        y = ops.linear(x, weight, *tail[:4], act=tail.act, norm_eps=eps, backend=backend)
        return y, oracle.linear(x, weight, tail, eps, sums=sums)

    return run


def _winograd(sample: Sample, backend: str, sums: torch.dtype | None) -> Outcome:
    from depthfuse.kernels.winograd import pack_weight

    c, side = sample.pick(16, 64), sample.pick(5, 15)
    x, weight = sample.image(2, c, side, side), 4 * sample.image(c + 8, c, 3, 3)
    tail = sample.tail(c + 8, sample.image(2, c + 8, side, side))
    y = ops.winograd_conv2d(x, pack_weight(weight), *tail[:4], act=tail.act, backend=backend)
    return y, oracle.conv2d(x, weight, tail, Window(padding=(1, 1)), sums=sums)


def _mlp(norm: bool) -> Callable[[Sample, str, torch.dtype | None], Outcome]:
    def run(sample: Sample, backend: str, sums: torch.dtype | None) -> Outcome:
        rows, c = sample.pick(9, 200), sample.pick(24, 96)
        x, w1, b1, w2 = sample(rows, c), sample(4 * c, c), sample(4 * c), sample(c, 4 * c)
        tail, eps = sample.tail(c, x, "none"), _NORM_EPS if norm else None
        act = "gelu" if norm else "relu"
        y = ops.mlp(x, w1, b1, w2, *tail[:4], act_inner=act, norm_eps=eps, backend=backend)
        return y, oracle.mlp(x, TwoLayers(w1, b1, w2), tail, act, eps, sums=sums)

    return run


def _depthwise_pointwise(sample: Sample, backend: str, sums: torch.dtype | None) -> Outcome:
    c, side = sample.pick(12, 96), sample.pick(5, 14)
    x, w1, b1, w2 = (
        sample.image(2, c, side, side),
        sample.image(c, 1, 7, 7),
        sample(c),
        sample.image(c, c, 1, 1),
    )
    tail = sample.tail(c, x, "none")
    y = ops.depthwise_pointwise(x, w1, b1, w2, *tail[:4], padding=3, act_inner="relu", backend=backend)
    window = Window(padding=(3, 3))
    return y, oracle.depthwise_pointwise(x, TwoLayers(w1, b1, w2), tail, window, "relu", sums=sums)


def _inverted_residual(stride: int) -> Callable[[Sample, str, torch.dtype | None], Outcome]:
    def run(sample: Sample, backend: str, sums: torch.dtype | None) -> Outcome:
        c, side = sample.pick(8, 24), sample.pick(5, 15)
        hidden, out = sample.pick(24, 144), (side - 1) // stride + 1
        x = sample.image(2, c, side, side)
        weights = ThreeLayers(
            sample.image(hidden, c, 1, 1), sample(hidden), sample.image(hidden, 1, 3, 3), sample(hidden),
            sample.image(c, hidden, 1, 1),
        )  # fmt: skip
        tail = sample.tail(c, sample.image(2, c, out, out), "none")
        y = ops.inverted_residual(x, *weights, *tail[:4], stride=stride, backend=backend)
        return y, oracle.inverted_residual(x, weights, tail, stride, sums=sums)

    return run


def _attention(sample: Sample, backend: str, sums: torch.dtype | None) -> Outcome:
    tokens, heads = sample.pick(17, 197), sample.pick(1, 3)
    qkv = sample(2, tokens, 3 * heads * 64)
    return ops.attention(qkv, heads, backend=backend), oracle.attention(qkv, heads, sums=sums)


def _pool_linear(batch: int, norm: bool) -> Callable[[Sample, str, torch.dtype | None], Outcome]:
    def run(sample: Sample, backend: str, sums: torch.dtype | None) -> Outcome:
        c = sample.pick(24, 320)
        x, weight, bias = sample.image(batch, c, 4, 4), sample(40, c), sample(40)
        eps = _NORM_EPS if norm else None
        y = ops.pool_linear(x, weight, bias, norm_eps=eps, backend=backend)
        return y, oracle.pool_linear(x, weight, bias, eps, sums=sums)

    return run


CASES = (
    Case("conv2d", "3x3", _conv2d((8, 64), (12, 80), 3, 1)),
    Case("conv2d", "3x3, stride 2", _conv2d((8, 40), (12, 72), 3, 2)),
    Case("conv2d", "stem 7x7", _conv2d((3, 3), (16, 64), 7, 2)),
    Case("conv2d", "4 groups", _conv2d((16, 64), (16, 64), 3, 1, (4, 4))),
    Case("conv2d", "depthwise 3x3", _conv2d((12, 96), (12, 96), 3, 2, (12, 96))),
    Case(
        "conv2d",
        "depthwise 7x7 + LayerNorm",
        _conv2d((12, 96), (12, 96), 7, 1, (12, 96), norm=True),
        exact=False,
    ),
    Case("winograd_conv2d", "3x3", _winograd, real=False),  # its bound on real values is another
    Case("linear", "rows of tokens", _linear((9, 197), (24, 192), (20, 200))),
    Case("linear", "few rows, deep", _linear((3, 8), (64, 2048), (20, 72))),
    Case("linear", "LayerNorm", _linear((9, 197), (24, 192), (20, 576), norm=True), exact=False),
    Case("mlp", "plain", _mlp(norm=False)),
    Case("mlp", "LayerNorm + GELU", _mlp(norm=True), exact=False),
    Case("depthwise_pointwise", "7x7", _depthwise_pointwise),
    Case("inverted_residual", "stride 1", _inverted_residual(1)),
    Case("inverted_residual", "stride 2", _inverted_residual(2)),
    Case("attention", "heads of 64", _attention, exact=False),
    Case("pool_linear", "one image", _pool_linear(1, norm=False), exact=False),
    Case("pool_linear", "a batch, LayerNorm", _pool_linear(9, norm=True), exact=False),
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))
