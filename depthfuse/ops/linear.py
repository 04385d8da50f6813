"""y = scale * act(norm(x) @ weight.T + bias + residual) + shift: the op `depthfuse::linear`.

norm is nothing, or LayerNorm without its affine, which belongs in weight and bias. See `depthfuse.ops.conv2d`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.kernels.arguments import Tail
from depthfuse.ops.activations import finish
from depthfuse.ops.backend import product_refusal
from depthfuse.ops.checks import check_channels, check_norm_eps, check_same_kind, check_tail, shape_text
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import ROWS, row_tail


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


def linear_reference(x: Tensor, weight: Tensor, tail: Tail, norm_eps: float | None = None) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does. Shapes as in `linear`."""
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=norm_eps)
    return finish(F.linear(x, weight, tail.bias), tail, (-1,))


def check_arguments(x: Tensor, weight: Tensor, tail: Tail, norm_eps: float | None = None) -> list[int]:
    """Check everything that `linear` promises to check; returns the output's shape."""
    check_norm_eps("linear", norm_eps)
    check_same_kind("linear", x, {"weight": weight, **tail.tensors()})
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
    check_tail("linear", shape, tail, channel_dim=-1)
    return shape


def _triton(x: Tensor, weight: Tensor, tail: Tail, norm_eps: float | None) -> Tensor:
    from depthfuse.kernels.linear import linear as triton_linear

    # The kernel takes rows that lie apart, such as the class token of each image, without a copy.
    x = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
    return triton_linear(x, weight.contiguous(), row_tail(tail), norm_eps=norm_eps)


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
    values={"tail": Tail},
    layout=ROWS,
    check=check_arguments,
    refusal=lambda x, **rest: product_refusal(x.dtype),
    reference=linear_reference,
    triton=_triton,
    flops=_flops,
)
