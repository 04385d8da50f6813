"""Global average pool and the linear layer behind it as one op: `depthfuse::pool_linear`.

    y = norm(mean of x over its pixels) weight^T + bias

norm is nothing, or LayerNorm without its affine, which belongs in weight and bias. See `depthfuse.ops.conv2d` for the
rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthfuse.kernels.arguments import Tail
from depthfuse.ops.backend import product_refusal
from depthfuse.ops.checks import check_channels, check_norm_eps, check_same_kind, check_shape, shape_text
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import ROWS, contiguous, nhwc
from depthfuse.ops.linear import linear_flops, linear_reference


def pool_linear(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C]
    bias: Tensor | None = None,  # [K]
    *,
    norm_eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over the pixels, LayerNorm where `norm_eps` is given, linear layer; without autograd.

    Args:
        x: [N, C, H, W], any strides, at least one pixel; N may be 0. weight: [K, C]; bias: [K] or None. All of x's
            dtype and on its device.
        norm_eps: the epsilon of LayerNorm over C, or None for no norm.
        backend: "auto", "triton" or "reference", see `depthfuse.ops.resolve_backend`.

    Returns:
        [N, K], contiguous.

    Raises:
        ValueError: shapes, devices or names that do not fit. TypeError: dtypes that do not. BackendError.
    """
    return torch.ops.depthfuse.pool_linear(x, weight, bias, backend, norm_eps)


def pool_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_eps: float | None = None
) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does."""
    return linear_reference(x.mean((2, 3)), weight, Tail(bias), norm_eps)


def check_arguments(x, weight, bias, norm_eps) -> list[int]:
    """Check everything that `pool_linear` promises to check; returns the output's shape."""
    op = "pool_linear"
    check_norm_eps(op, norm_eps)
    check_same_kind(op, x, {"weight": weight, "bias": bias})
    for name, tensor, form, axes in (("x", x, "[N, C, H, W]", 4), ("weight", weight, "[K, C]", 2)):
        if tensor.dim() != axes:
            raise ValueError(f"{op}: {name} has shape {shape_text(tensor.shape)}, expected {form}")
    batch, channels, height, width = x.shape
    outputs = weight.shape[0]
    check_channels(op, x=channels, weight=outputs)
    if min(height, width) < 1:
        raise ValueError(f"{op}: x has shape {shape_text(x.shape)}, expected at least one pixel")
    check_shape(op, "weight", weight, [outputs, channels], f"x has {channels} channels")
    check_shape(op, "bias", bias, [outputs], f"weight has {outputs} rows")
    return [batch, outputs]


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, norm_eps: float | None) -> Tensor:
    from depthfuse.kernels.pool_linear import pool_linear as triton_pool_linear

    return triton_pool_linear(nhwc(x), *contiguous(weight, bias), norm_eps=norm_eps)


def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return linear_flops(x_shape[:2], weight_shape)


declare(
    "pool_linear(Tensor x, Tensor weight, Tensor? bias, str backend, float? norm_eps=None) -> Tensor",
    values={},
    layout=ROWS,
    check=check_arguments,
    refusal=lambda x, **rest: product_refusal(x.dtype),
    reference=pool_linear_reference,
    triton=_triton,
    flops=_flops,
)
