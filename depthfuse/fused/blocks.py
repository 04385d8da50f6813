"""Autograd-free modules that stand for several products: whole blocks, or parts of them, in one launch of a GPU.

Each has three implementations to choose from by measurement: "triton", the one launch; "layers", a launch of ours for
each product; and "reference", the vendor's library. A fused launch saves the traffic of what lies between its products
and pays for it (work done twice at borders, weights read again), so none of them is always best. Attention is the one
that has implementations on a CPU, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from depthfuse import ops
from depthfuse.fused.layers import FusedConv2d, FusedLinear, FusedModule
from depthfuse.kernels.arguments import ThreeLayers, TwoLayers
from depthfuse.ops import cpu
from depthfuse.ops.activations import activation
from depthfuse.ops.attention import refusal as attention_refusal
from depthfuse.ops.depthwise_pointwise import refusal as depthwise_pointwise_refusal
from depthfuse.ops.inverted_residual import refusal as inverted_residual_refusal
from depthfuse.ops.mlp import refusal as mlp_refusal


class FusedBlock(FusedModule):
    """A module of several products. A subclass gives the one op (`_op`) and the op for each product (`_layers`)."""

    _op: Callable[..., Tensor]
    _depthwise: str  # the depthwise weight's name, where there is one

    def __init__(self, backend: str, config: dict[str, Any], **tensors: Tensor | None) -> None:
        for name in ("act", "act_inner"):
            if name in config:
                activation(config[name])
        super().__init__(backend, **tensors)
        self._config = config

    def config(self) -> dict[str, Any]:
        return {**self._config, "backend": self.backend}

    def _triton_candidates(self) -> list[str]:
        return ["triton", "layers"]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._runs_bound(x):
            assert self._runner is not None
            with torch.no_grad():  # an input that requires a gradient must not make this record one
                return self._runner(x)
        if self._bound == "layers":
            return self._layers(x, residual, self.backend)
        if torch.jit.is_tracing():  # what TorchScript knows how to fuse
            return self._layers(x, residual, "reference")
        return self._fused(x, residual, self._op_backend())

    def _weights(self) -> dict[str, Tensor | None]:
        """The op's tensor arguments but the inputs, the depthwise weight as the kernels read it fastest."""
        packed = {} if self._packed is None else {self._depthwise: self._packed}
        return {**self.tensors(), **packed}

    def _fused(self, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        return self._op(x, **self._weights(), residual=residual, **self._config, backend=backend)

    def _layers(self, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        raise NotImplementedError

    def epilogue(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self._config.items() if isinstance(v, str)) or "none"


class FusedInvertedResidual(FusedBlock):
    """Expand 1x1, depthwise k x k, project 1x1 and the skip; the formula is that of `depthfuse.ops.inverted_residual`.

    Args:
        w1: [hidden, C, 1, 1]; b1, b2: [hidden]; w2: [hidden, 1, R, R]; w3: [K, hidden, 1, 1]; b3, scale, shift: [K] or
            None. All of one dtype, on one device.
        stride: of the depthwise convolution, whose padding is R // 2.
        act_inner, act, backend: see `depthfuse.ops.inverted_residual`.
    """

    op = "inverted_residual"
    _op = staticmethod(ops.inverted_residual)
    _depthwise = "w2"

    def __init__(
        self, w1, b1, w2, b2, w3, b3=None, scale=None, shift=None, *, stride, act_inner, act, backend
    ):
        w1, w3 = (w.contiguous(memory_format=torch.channels_last) for w in (w1, w3))
        tensors = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w3": w3, "b3": b3, "scale": scale, "shift": shift}
        super().__init__(backend, {"stride": stride, "act_inner": act_inner, "act": act}, **tensors)

    def _pack(self, name: str) -> Tensor:
        from depthfuse.kernels.depthwise import pack_weight

        return pack_weight(self.w2)

    def _refusal(self, x: Tensor) -> str | None:
        weights = ThreeLayers(self.w1, self.b1, self.w2, self.b2, self.w3)
        return inverted_residual_refusal(x, weights, self._config["stride"])

    def _layers(self, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        w2 = self._weights()["w2"]
        inner = {"act": self._config["act_inner"], "backend": backend}
        geometry = {"stride": self._config["stride"], "padding": w2.shape[-1] // 2, "groups": len(w2)}
        expanded = ops.conv2d(x, self.w1, self.b1, **inner)
        filtered = ops.conv2d(expanded, w2, self.b2, **geometry, **inner)
        tail = (self.b3, residual, self.scale, self.shift)
        return ops.conv2d(filtered, self.w3, *tail, act=self._config["act"], backend=backend)


class FusedDepthwisePointwise(FusedBlock):
    """Depthwise and 1x1 convolution; the formula is that of `depthfuse.ops.depthwise_pointwise`.

    Args:
        w1: [C, 1, R, S]; b1: [C] or None; w2: [K, C, 1, 1]; b2, scale, shift: [K] or None. All of one dtype, on one
            device.
        stride, padding, dilation: of the depthwise convolution, (height, width).
        act_inner, act, backend: see `depthfuse.ops.depthwise_pointwise`.
    """

    op = "depthwise_pointwise"
    _op = staticmethod(ops.depthwise_pointwise)
    _depthwise = "w1"

    def __init__(
        self,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        act_inner: str,
        act: str,
        backend: str,
    ) -> None:
        w2 = w2.contiguous(memory_format=torch.channels_last)
        tensors = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "scale": scale, "shift": shift}
        config = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}
        super().__init__(backend, {**config, "act_inner": act_inner, "act": act}, **tensors)

    def _pack(self, name: str) -> Tensor:
        from depthfuse.kernels.depthwise import pack_weight

        return pack_weight(self.w1)

    def _refusal(self, x: Tensor) -> str | None:
        return depthwise_pointwise_refusal(x, TwoLayers(self.w1, self.b1, self.w2))

    def _layers(self, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        w1 = self._weights()["w1"]
        geometry = {name: self._config[name] for name in ("stride", "padding", "dilation")}
        inner = {"groups": len(w1), "act": self._config["act_inner"], "backend": backend}
        filtered = ops.conv2d(x, w1, self.b1, **geometry, **inner)
        tail = (self.b2, residual, self.scale, self.shift)
        return ops.conv2d(filtered, self.w2, *tail, act=self._config["act"], backend=backend)


class FusedMlp(FusedBlock):
    """Linear, activation, linear; the formula is that of `depthfuse.ops.mlp`.

    Args:
        w1: [hidden, C]; b1: [hidden] or None; w2: [K, hidden]; b2, scale, shift: [K] or None. All of one dtype, on one
            device.
        act_inner, act, norm_eps, backend: see `depthfuse.ops.mlp`.
    """

    op = "mlp"
    _op = staticmethod(ops.mlp)

    def __init__(
        self, w1, b1, w2, b2=None, scale=None, shift=None, *, act_inner, act, norm_eps=None, backend
    ):
        tensors = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "scale": scale, "shift": shift}
        super().__init__(backend, {"act_inner": act_inner, "act": act, "norm_eps": norm_eps}, **tensors)

    def _refusal(self, x: Tensor) -> str | None:
        return mlp_refusal(x, TwoLayers(self.w1, self.b1, self.w2))

    def _layers(self, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        inner = {"act": self._config["act_inner"], "norm_eps": self._config["norm_eps"], "backend": backend}
        hidden = ops.linear(x, self.w1, self.b1, **inner)
        tail = (self.b2, residual, self.scale, self.shift)
        return ops.linear(hidden, self.w2, *tail, act=self._config["act"], backend=backend)


class FusedAttention(FusedBlock):
    """Softmax attention, read from the qkv projection's output: [B, N, 3 * heads * D] -> [B, N, heads * D].

    Args:
        like: an empty tensor of the dtype and on the device that it works in; it has no weights that would say so.
        heads, scale, backend: see `depthfuse.ops.attention`.
    """

    op = "attention"

    def __init__(self, like: Tensor, *, heads: int, scale: float | None = None, backend: str) -> None:
        super().__init__(backend, {"heads": heads, "scale": scale}, like=like)

    def _triton_candidates(self) -> list[str]:
        return ["triton"]

    def _refusal(self, x: Tensor) -> str | None:
        return attention_refusal(x, **self._config) if x.dim() == 3 else super()._refusal(x)

    def _cpu_candidates(self) -> list[str]:
        return cpu.attention_candidates(self.like.dtype)

    def _bind_cpu(self, name: str, input_size: Sequence[int]) -> Callable[..., Tensor] | None:
        return cpu.bind_attention(name, **self._config)

    def _fused(self, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        return ops.attention(x, **self._config, backend=backend)

    def _layers(self, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        return ops.attention_reference(x, **self._config)


class FusedPoolLinear(FusedBlock):
    """Global average pool and linear layer: [N, C, H, W] -> [N, K], as `depthfuse.ops.pool_linear`.

    Args:
        weight: [K, C]; bias: [K] or None. Of one dtype, on one device.
        norm_eps, backend: see `depthfuse.ops.pool_linear`.
    """

    op = "pool_linear"

    def __init__(self, weight, bias=None, *, norm_eps=None, backend):
        super().__init__(backend, {"norm_eps": norm_eps}, weight=weight, bias=bias)

    def _triton_candidates(self) -> list[str]:
        return ["triton"]

    def _fused(self, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
        return ops.pool_linear(x, self.weight, self.bias, **self._config, backend=backend)

    _layers = _fused


# All fused modules by name, for those who rebuild a plan from a file.
FUSED_MODULES: dict[str, type[FusedModule]] = {
    cls.__name__: cls
    for cls in (
        FusedConv2d,
        FusedLinear,
        FusedInvertedResidual,
        FusedDepthwisePointwise,
        FusedMlp,
        FusedAttention,
        FusedPoolLinear,
    )
}
