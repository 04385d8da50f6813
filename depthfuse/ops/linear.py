"""y = scale * act(x @ weight.T + bias + residual) + shift: the op `depthfuse::linear`. See
`depthfuse.ops.conv2d`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from depthfuse.ops.activations import activation
from depthfuse.ops.backend import resolve_backend
from depthfuse.ops.checks import check_same_kind, check_shape, shape_text

torch.library.define(
    "depthfuse::linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift, str act, "
    "str backend) -> Tensor",
)


def linear(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [K, C]
    bias: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [..., K], the output's shape
    scale: Tensor | None = None,  # [K]
    shift: Tensor | None = None,  # [K]
    *,
    act: str = "none",
    backend: str = "auto",
) -> Tensor:
    """scale * act(x @ weight.T + bias + residual) + shift, without autograd.

    Args:
        x: [..., C], any strides, any leading axes (also empty ones). weight: [K, C]. bias, scale, shift: [K]
            or None. residual: [..., K] or None. All of x's dtype and on its device.
        act: "none", "relu", "relu6", "gelu", "gelu_tanh", "silu" or "hardswish".
        backend: "auto", "triton" or "reference", see `depthfuse.ops.resolve_backend`.

    Returns:
        [..., K], contiguous.

    Raises:
        ValueError: shapes, devices or names that do not fit. TypeError: dtypes that do not. BackendError.
    """
    return torch.ops.depthfuse.linear(x, weight, bias, residual, scale, shift, act, backend)


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    act: str,
) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does. Shapes as in
    `linear`.
    """
    y = F.linear(x, weight, bias)
    if residual is not None:
        y = y + residual
    y = activation(act).apply(y)
    if scale is not None:
        y = y * scale
    if shift is not None:
        y = y + shift
    return y


def check_arguments(x, weight, bias, residual, scale, shift, act) -> list[int]:
    """Check everything that `linear` promises to check; returns the output's shape."""
    activation(act)
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
    shape = [*x.shape[:-1], features_out]
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        check_shape("linear", name, vector, [features_out], f"weight has {features_out} rows")
    check_shape("linear", "residual", residual, shape, "the output's shape")
    return shape


@torch.library.register_fake("depthfuse::linear")
def _linear_fake(x, weight, bias, residual, scale, shift, act, backend):
    return x.new_empty(check_arguments(x, weight, bias, residual, scale, shift, act))


# Skip the autograd keys: by default PyTorch would mark the output as requiring a gradient that nothing computes.
torch.library.impl("depthfuse::linear", "Autograd", torch.library.fallthrough_kernel)


@torch.library.impl("depthfuse::linear", "CompositeExplicitAutograd")
@torch.no_grad()
def _linear(x, weight, bias, residual, scale, shift, act, backend):
    shape = check_arguments(x, weight, bias, residual, scale, shift, act)
    name, _ = resolve_backend(backend, x.device)
    if 0 in shape:
        return x.new_empty(shape)
    if name == "reference":
        return linear_reference(x, weight, bias, residual, scale, shift, act=act).contiguous()
    from depthfuse.kernels.linear import linear as triton_linear

    return triton_linear(x, weight, bias, residual, scale, shift, act=act)


@register_flop_formula(torch.ops.depthfuse.linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]
