"""Linear, activation, linear and skip of a ConvNeXt or ViT block as one op: `depthfuse::mlp`.

    y = scale * act(act_inner(norm(x) @ w1.T + b1) @ w2.T + b2 + residual) + shift

norm is nothing, or LayerNorm without its affine, which belongs in w1 and b1; LayerScale belongs in w2 and b2.
See `depthfuse.ops.conv2d` for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthfuse.kernels.arguments import Tail, TwoLayers
from depthfuse.ops.activations import activation
from depthfuse.ops.backend import product_refusal
from depthfuse.ops.checks import (
    check_channels,
    check_norm_eps,
    check_same_kind,
    check_shape,
    check_tail,
    shape_text,
)
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import ROWS, contiguous, row_tail
from depthfuse.ops.linear import linear_flops, linear_reference


def mlp(
    x: Tensor,  # [..., C]
    w1: Tensor,  # [hidden, C]
    b1: Tensor | None,  # [hidden]
    w2: Tensor,  # [K, hidden]
    b2: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [..., K], the output's shape
    scale: Tensor | None = None,  # [K]
    shift: Tensor | None = None,  # [K]
    *,
    act_inner: str = "gelu",
    act: str = "none",
    norm_eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Two linear layers with an activation between them, without autograd; the formula is at this file's head.

    Args:
        x: [..., C], any strides, any leading axes (also empty ones). w1: [hidden, C]; b1: [hidden] or None;
            w2: [K, hidden]; b2, scale, shift: [K] or None; residual: [..., K] or None. All of x's dtype and on its
            device.
        act_inner, act: "none", "relu", "relu6", "gelu", "gelu_tanh", "silu" or "hardswish".
        norm_eps: None for no norm, else the epsilon of LayerNorm over C.
        backend: "auto", "triton" or "reference". The kernel takes at most 256 channels C and K; for more "auto" takes
            the reference.

    Returns:
        [..., K], contiguous.

    Raises:
        ValueError: shapes, devices or names that do not fit. TypeError: dtypes that do not. BackendError.
    """
    return torch.ops.depthfuse.mlp(
        x, w1, b1, w2, b2, residual, scale, shift, act_inner, act, backend, norm_eps
    )


def mlp_reference(
    x: Tensor, weights: TwoLayers, tail: Tail, act_inner: str, norm_eps: float | None = None
) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does."""
    hidden = linear_reference(x, weights.w1, Tail(weights.b1, act=act_inner), norm_eps)
    return linear_reference(hidden, weights.w2, tail)


def check_arguments(
    x: Tensor, weights: TwoLayers, tail: Tail, act_inner: str, norm_eps: float | None = None
) -> list[int]:
    """Check everything that `mlp` promises to check; returns the output's shape."""
    activation(act_inner)
    check_norm_eps("mlp", norm_eps)
    check_same_kind("mlp", x, {**weights._asdict(), **tail.tensors("b2")})
    w1, b1, w2 = weights
    for name, weight, form in (("w1", w1, "[hidden, C]"), ("w2", w2, "[K, hidden]")):
        if weight.dim() != 2:
            raise ValueError(f"mlp: {name} has shape {shape_text(weight.shape)}, expected {form}")
    hidden, channels = w1.shape
    outputs = w2.shape[0]
    if x.dim() < 1 or x.shape[-1] != channels:
        raise ValueError(
            f"mlp: x has shape {shape_text(x.shape)}, expected [..., {channels}] "
            f"(w1 has shape {shape_text(w1.shape)})"
        )
    check_channels("mlp", x=channels, w1=hidden, w2=outputs)
    check_shape("mlp", "w2", w2, [outputs, hidden], f"w1 has {hidden} rows")
    check_shape("mlp", "b1", b1, [hidden], f"w1 has {hidden} rows")
    shape = [*x.shape[:-1], outputs]
    check_tail("mlp", shape, tail, channel_dim=-1, bias="b2")
    return shape


def refusal(x: Tensor, weights: TwoLayers, **rest) -> str | None:
    """What the kernel does not take of a call, in words, or None."""
    from depthfuse.kernels.mlp import supports

    size = (weights.w1.shape[1], weights.w2.shape[0])
    if supports(*size, x.dtype):
        return product_refusal(x.dtype)
    return "{} -> {} channels of {}".format(*size, x.dtype)


def _triton(x: Tensor, weights: TwoLayers, tail: Tail, act_inner: str, norm_eps: float | None) -> Tensor:
    from depthfuse.kernels.mlp import mlp as triton_mlp

    options = {"act_inner": act_inner, "norm_eps": norm_eps}
    return triton_mlp(x.contiguous(), TwoLayers(*contiguous(*weights)), row_tail(tail), **options)


def _flops(x_shape, w1_shape, b1_shape, w2_shape, *args, out_shape=None, **kwargs) -> int:
    hidden_shape = (*x_shape[:-1], w1_shape[0])
    return linear_flops(x_shape, w1_shape) + linear_flops(hidden_shape, w2_shape)


declare(
    "mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, Tensor? scale, Tensor? shift, "
    "str act_inner, str act, str backend, float? norm_eps=None) -> Tensor",
    values={"weights": TwoLayers, "tail": Tail},
    bias="b2",
    layout=ROWS,
    check=check_arguments,
    refusal=refusal,
    reference=mlp_reference,
    triton=_triton,
    flops=_flops,
)
