"""y = scale * act(norm(x) @ weight.T + bias + residual) + shift: the op `depthfuse::linear`.

norm is nothing, or LayerNorm without its affine, which belongs in weight and bias. See `depthfuse.ops.conv2d`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.ops.activations import activation
from depthfuse.ops.backend import runs_triton
from depthfuse.ops.checks import (
    check_channels,
    check_epilogue,
    check_norm_eps,
    check_same_kind,
    shape_text,
)
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import contiguous


def linear(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [K, C]
    bias: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [..., K], the output's shape
    scale: Tensor | None = None,  # [K]
    shift: Tensor | None = None,  # [K]
    *,
    act: str = "none",
    norm_eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """scale * act(norm(x) @ weight.T + bias + residual) + shift, without autograd.

    Args:
        x: [..., C], any strides, any leading axes (also empty ones). weight: [K, C]. bias, scale, shift: [K]
            or None. residual: [..., K] or None. All of x's dtype and on its device.
        act: "none", "relu", "relu6", "gelu", "gelu_tanh", "silu" or "hardswish".
        norm_eps: None for no norm, else the epsilon of LayerNorm over C, whose own affine gamma, beta belongs in
            weight and bias as weight diag(gamma) and bias + weight beta.
        backend: "auto", "triton" or "reference", see `depthfuse.ops.resolve_backend`.

    Returns:
        [..., K], contiguous.

    Raises:
        ValueError: shapes, devices or names that do not fit. TypeError: dtypes that do not. BackendError.
    """
    return torch.ops.depthfuse.linear(x, weight, bias, residual, scale, shift, act, backend, norm_eps)


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    act: str,
    norm_eps: float | None = None,
) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does. Shapes as in
    `linear`.
    """
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=norm_eps)
    y = F.linear(x, weight, bias)
    if residual is not None:
        y = y + residual
    y = activation(act).apply(y)
    if scale is not None:
        y = y * scale
    if shift is not None:
        y = y + shift
    return y


def check_arguments(x, weight, bias, residual, scale, shift, act, norm_eps=None) -> list[int]:
    """Check everything that `linear` promises to check; returns the output's shape."""
    activation(act)
    check_norm_eps("linear", norm_eps)
    check_same_kind(
        "linear", x, {"weight": weight, "bias": bias, "residual": residual, "scale": scale, "shift": shift}
    )
    if weight.dim() != 2:
        raise ValueError(f"linear: weight has shape {shape_text(weight.shape)}, expected [K, C]")
    features_out, features_in = weight.shape
    if x.dim() < 1 or x.shape[-1] != features_in:
        raise ValueError(
            f"linear: x has shape {shape_text(x.shape)}, expected [..., {features_in}] "
            f"(weight has shape {shape_text(weight.shape)})"
        )
    check_channels("linear", x=features_in, weight=features_out)
    shape = [*x.shape[:-1], features_out]
    check_epilogue("linear", shape, bias=bias, residual=residual, scale=scale, shift=shift, channel_dim=-1)
    return shape


def _fake(x, weight, bias, residual, scale, shift, act, backend, norm_eps=None):
    return x.new_empty(check_arguments(x, weight, bias, residual, scale, shift, act, norm_eps))


def _run(x, weight, bias, residual, scale, shift, act, backend, norm_eps=None):
    shape = check_arguments(x, weight, bias, residual, scale, shift, act, norm_eps)
    triton = runs_triton("linear", backend, x)
    if 0 in shape:
        return x.new_empty(shape)
    options = {"act": act, "norm_eps": norm_eps}
    if not triton:
        return linear_reference(x, weight, bias, residual, scale, shift, **options).contiguous()
    from depthfuse.kernels.linear import linear as triton_linear

    # The kernel takes rows that lie apart, such as the class token of each image, without a copy.
    x = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
    return triton_linear(x, *contiguous(weight, bias, residual, scale, shift), **options)


def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return linear_flops(x_shape, weight_shape)


def linear_flops(x_shape, weight_shape) -> int:
    """2 * rows * C * K: a multiplication and an addition a weight and row, as PyTorch counts linear."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]


declare(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift, str act, "
    "str backend, float? norm_eps=None) -> Tensor",
    fake=_fake,
    run=_run,
    flops=_flops,
)
