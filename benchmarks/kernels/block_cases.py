"""Cases (see cases.py) of operators that fuse several layers into one launch."""

from dataclasses import dataclass

from benchmarks.kernels.cases import NORM_EPS, Case, channels_last, random
from depthfuse import ops
from depthfuse.kernels.arguments import Tail, ThreeLayers, TwoLayers, Window


@dataclass(frozen=True)
class InvertedResidualCase(Case):
    """Expand 1x1, depthwise 3x3, project 1x1, and the skip where shapes allow one."""

    op = "inverted_residual"
    batch: int
    channels: int
    size: int
    hidden: int
    out_channels: int
    stride: int
    skip: bool
    act: str = "relu6"

    def operands(self, dtype, device):
        from depthfuse.kernels.depthwise import pack_weight

        x = channels_last(random((self.batch, self.channels, self.size, self.size), dtype, device))
        return {
            "x": x,
            "w1": channels_last(random((self.hidden, self.channels, 1, 1), dtype, device)),
            "b1": random((self.hidden,), dtype, device),
            "w2": pack_weight(random((self.hidden, 1, 3, 3), dtype, device)),
            "b2": random((self.hidden,), dtype, device),
            "w3": channels_last(random((self.out_channels, self.hidden, 1, 1), dtype, device)),
            "b3": random((self.out_channels,), dtype, device),
            "residual": x if self.skip else None,
        }

    def _out_size(self) -> int:
        return (self.size - 1) // self.stride + 1

    def launches(self, dtype, target):
        from depthfuse.kernels import inverted_residual

        size = self._out_size()
        y = channels_last(random((self.batch, self.out_channels, size, size), dtype, "meta"))
        x, *weights, b3, residual = self.operands(dtype, "meta").values()
        tail, options = Tail(b3, residual), {"stride": self.stride, "act_inner": self.act}
        options |= {"config": None, "target": target}
        return [inverted_residual.plan(x, ThreeLayers(*weights), tail, y, **options)]

    def flops(self):
        pixels, out_pixels = self.batch * self.size**2, self.batch * self._out_size() ** 2
        return 2.0 * self.hidden * (pixels * self.channels + out_pixels * (9 + self.out_channels))

    def elements_moved(self):
        weights = self.hidden * (self.channels + 9 + self.out_channels)
        pixels, out_pixels = self.batch * self.size**2, self.batch * self._out_size() ** 2
        return pixels * self.channels + out_pixels * self.out_channels + weights

    def eager(self, x, w1, b1, w2, b2, w3, b3, residual):
        weights, tail = ThreeLayers(w1, b1, w2, b2, w3), Tail(b3, residual)
        return ops.inverted_residual_reference(x, weights, tail, self.stride, self.act)

    def ours(self, x, w1, b1, w2, b2, w3, b3, residual):
        from depthfuse.kernels.inverted_residual import inverted_residual

        weights, tail = ThreeLayers(w1, b1, w2, b2, w3), Tail(b3, residual)
        return inverted_residual(x, weights, tail, stride=self.stride, act_inner=self.act)


@dataclass(frozen=True)
class DepthwisePointwiseCase(Case):
    """Depthwise k x k, activation, 1x1, and the skip; `affine`: scale and shift after the last activation."""

    op = "depthwise_pointwise"
    batch: int
    channels: int
    size: int
    out_channels: int
    kernel: int
    act_inner: str
    act: str
    skip: bool
    affine: bool

    def operands(self, dtype, device):
        from depthfuse.kernels.depthwise import pack_weight

        x = channels_last(random((self.batch, self.channels, self.size, self.size), dtype, device))
        k = self.out_channels
        return {
            "x": x,
            "w1": pack_weight(random((self.channels, 1, self.kernel, self.kernel), dtype, device)),
            "b1": random((self.channels,), dtype, device),
            "w2": channels_last(random((k, self.channels, 1, 1), dtype, device)),
            "b2": random((k,), dtype, device),
            "residual": x if self.skip else None,
            "scale": random((k,), dtype, device) if self.affine else None,
            "shift": random((k,), dtype, device) if self.affine else None,
        }

    def _window(self) -> Window:
        return Window(padding=(self.kernel // 2,) * 2)

    def launches(self, dtype, target):
        from depthfuse.kernels import depthwise_pointwise

        y = channels_last(random((self.batch, self.out_channels, self.size, self.size), dtype, "meta"))
        x, *weights, b2, residual, scale, shift = self.operands(dtype, "meta").values()
        tail = Tail(b2, residual, scale, shift, self.act)
        options = {"act_inner": self.act_inner, "config": None, "target": target}
        return [depthwise_pointwise.plan(x, TwoLayers(*weights), tail, y, self._window(), **options)]

    def flops(self):
        return 2.0 * self.batch * self.size**2 * self.channels * (self.kernel**2 + self.out_channels)

    def elements_moved(self):
        pixels = self.batch * self.size**2
        return pixels * (self.channels + self.out_channels) + self.channels * (
            self.kernel**2 + self.out_channels
        )

    def eager(self, x, w1, b1, w2, b2, residual, scale, shift):
        weights, tail = TwoLayers(w1, b1, w2), Tail(b2, residual, scale, shift, self.act)
        return ops.depthwise_pointwise_reference(x, weights, tail, self._window(), self.act_inner)

    def ours(self, x, w1, b1, w2, b2, residual, scale, shift):
        from depthfuse.kernels.depthwise_pointwise import depthwise_pointwise

        weights, tail = TwoLayers(w1, b1, w2), Tail(b2, residual, scale, shift, self.act)
        return depthwise_pointwise(x, weights, tail, self._window(), act_inner=self.act_inner)


@dataclass(frozen=True)
class MlpCase(Case):
    """Linear, GELU, linear and skip over `rows` tokens; `norm`: after LayerNorm without affine."""

    op = "mlp"
    rows: int
    channels: int
    hidden: int
    norm: bool

    def supports(self, dtype):
        from depthfuse.kernels.mlp import supports

        return supports(self.channels, self.channels, dtype)

    def operands(self, dtype, device):
        return {
            "x": random((self.rows, self.channels), dtype, device),
            "w1": random((self.hidden, self.channels), dtype, device),
            "b1": random((self.hidden,), dtype, device),
            "w2": random((self.channels, self.hidden), dtype, device),
            "b2": random((self.channels,), dtype, device),
            "residual": random((self.rows, self.channels), dtype, device),
        }

    def _norm_eps(self) -> float | None:
        return NORM_EPS if self.norm else None

    def launches(self, dtype, target):
        from depthfuse.kernels import mlp

        x, *weights, b2, residual = self.operands(dtype, "meta").values()
        options = {"act_inner": "gelu", "norm_eps": self._norm_eps(), "config": None, "target": target}
        return [mlp.plan(x, TwoLayers(*weights), Tail(b2, residual), residual, **options)]

    def flops(self):
        return 4.0 * self.rows * self.channels * self.hidden

    def elements_moved(self):
        return 3 * self.rows * self.channels + 2 * self.channels * self.hidden

    def eager(self, x, w1, b1, w2, b2, residual):
        weights, tail = TwoLayers(w1, b1, w2), Tail(b2, residual)
        return ops.mlp_reference(x, weights, tail, "gelu", self._norm_eps())

    def ours(self, x, w1, b1, w2, b2, residual):
        from depthfuse.kernels.mlp import mlp

        return mlp(x, TwoLayers(w1, b1, w2), Tail(b2, residual), norm_eps=self._norm_eps())


@dataclass(frozen=True)
class PoolLinearCase(Case):
    """Global average pool and classifier; `norm`: LayerNorm without affine between them."""

    op = "pool_linear"
    matrix = False
    batch: int
    channels: int
    size: int
    classes: int
    norm: bool

    def operands(self, dtype, device):
        x = channels_last(random((self.batch, self.channels, self.size, self.size), dtype, device))
        return {
            "x": x,
            "weight": random((self.classes, self.channels), dtype, device),
            "bias": random((self.classes,), dtype, device),
        }

    def _norm_eps(self) -> float | None:
        return NORM_EPS if self.norm else None

    def launches(self, dtype, target):
        from depthfuse.kernels import pool_linear

        y = random((self.batch, self.classes), dtype, "meta")
        operands = self.operands(dtype, "meta").values()
        return pool_linear.plan(*operands, y, norm_eps=self._norm_eps(), config=None, target=target)

    def flops(self):
        return 2.0 * self.batch * self.channels * self.classes

    def elements_moved(self):
        images = self.batch * (self.channels * self.size**2 + self.classes)
        return images + self.channels * self.classes

    def eager(self, x, weight, bias):
        return ops.pool_linear_reference(x, weight, bias, self._norm_eps())

    def ours(self, x, weight, bias):
        from depthfuse.kernels.pool_linear import pool_linear

        return pool_linear(x, weight, bias, norm_eps=self._norm_eps())


@dataclass(frozen=True)
class AttentionCase(Case):
    """Softmax attention on the output of the qkv projection."""

    op = "attention"
    batch: int
    tokens: int
    heads: int
    head_dim: int

    def operands(self, dtype, device):
        return {"qkv": random((self.batch, self.tokens, 3 * self.heads * self.head_dim), dtype, device)}

    def launches(self, dtype, target):
        from depthfuse.kernels import attention

        y = random((self.batch, self.tokens, self.heads * self.head_dim), dtype, "meta")
        options = {"heads": self.heads, "scale": self.head_dim**-0.5}
        return [attention.plan(self.operands(dtype, "meta")["qkv"], y, **options, config=None, target=target)]

    def flops(self):
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim

    def elements_moved(self):
        return 4 * self.batch * self.tokens * self.heads * self.head_dim

    def eager(self, qkv):
        return ops.attention_reference(qkv, self.heads, None)

    def ours(self, qkv):
        from depthfuse.kernels.attention import attention

        return attention(qkv, heads=self.heads)
