"""y = scale * act(norm(conv2d(x, weight) + bias) + residual) + shift: the op `depthfuse::conv2d`.

Residual before the activation, affine after it: a merged block is Conv -> activation -> BatchNorm. norm is nothing,
or LayerNorm over the channels of each pixel, as in ConvNeXt. Declared once here; "triton" and "reference"
implement it. Depthwise convolution is its case groups == C, with a Triton kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from depthfuse.ops.layouts import contiguous, dense_nhwc, depthwise_weight, empty_nhwc, nhwc

# With LayerNorm a program of the kernel holds all channels of its pixels; more would ask for more warps than there are.
_MAX_NORM_CHANNELS = 2048


def conv2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [N, K, P, Q], the output's shape
    scale: Tensor | None = None,  # [K]
    shift: Tensor | None = None,  # [K]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
    norm_eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """scale * act(norm(conv2d(x, weight) + bias) + residual) + shift, without autograd.

    Args:
        x: [N, C, H, W], any strides; channels_last is read in place, anything else is copied first. N may be
            0.
        weight: [K, C / groups, R, S]; bias, scale, shift: [K] or None; residual: [N, K, P, Q] or None. All of
            x's dtype (float32, float16, bfloat16; the reference takes float64 too) and on its device.
        stride, padding, dilation: one integer or (height, width).
        act: "none", "relu", "relu6", "gelu", "gelu_tanh", "silu" or "hardswish".
        norm_eps: None for no norm, else the epsilon of LayerNorm over K, whose own affine is scale and shift, or
            belongs in the next layer's weight. Fused where the convolution is depthwise and K is at most 2048.
        backend: "auto", "triton" or "reference", see `depthfuse.ops.resolve_backend`.

    Returns:
        [N, K, P, Q] in channels_last.

    Raises:
        ValueError: shapes, devices or names that do not fit. TypeError: dtypes that do not. BackendError.
    """
    return torch.ops.depthfuse.conv2d(
        x,
        weight,
        bias,
        residual,
        scale,
        shift,
        as_pair(stride),
        as_pair(padding),
        as_pair(dilation),
        groups,
        act,
        backend,
        norm_eps,
    )


def conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    norm_eps: float | None = None,
) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does. Shapes as in
    `conv2d`.
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if norm_eps is not None:
        y = F.layer_norm(y.permute(0, 2, 3, 1), (y.shape[1],), eps=norm_eps).permute(0, 3, 1, 2)
    if residual is not None:
        y = y + residual
    y = activation(act).apply(y)
    if scale is not None:
        y = y * scale.view(1, -1, 1, 1)
    if shift is not None:
        y = y + shift.view(1, -1, 1, 1)
    return y


def conv2d_flops(x_shape, weight_shape, output_shape) -> int:
    """2 * N * P * Q * K * (C / groups) * R * S: a multiplication and an addition a tap, as PyTorch counts
    conv2d.
    """
    batch, _, height, width = output_shape
    filters, group_channels, kernel_h, kernel_w = weight_shape
    return 2 * batch * height * width * filters * group_channels * kernel_h * kernel_w


def output_size(size: Sequence[int], kernel: Sequence[int], stride, padding, dilation) -> list[int]:
    """Output height and width of a convolution."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def as_pair(value: int | Sequence[int]) -> list[int]:
    """One integer for both axes, or (height, width). Raises ValueError for anything else."""
    pair = [value, value] if isinstance(value, int | torch.SymInt) else list(value)
    if len(pair) != 2:
        raise ValueError(f"expected one integer or two (height, width), got {value}")
    return pair


def check_window(op: str, x: Tensor, kernel: Sequence[int], stride, padding, dilation) -> list[int]:
    """Raise ValueError for a geometry that does not fit x [N, C, H, W]; returns the output's height and width."""
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(pair) < least:
            raise ValueError(f"{op}: {name} is {tuple(pair)}, expected at least {least}")
    size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"{op}: x of {shape_text(x.shape)} is smaller than the kernel {shape_text(kernel)} with "
            f"padding {tuple(padding)} and dilation {tuple(dilation)}"
        )
    return size


def check_arguments(
    x, weight, bias, residual, scale, shift, stride, padding, dilation, groups, act, norm_eps=None
) -> list[int]:
    """Check everything that `conv2d` promises to check; returns the output's shape."""
    activation(act)
    check_norm_eps("conv2d", norm_eps)
    check_same_kind(
        "conv2d", x, {"weight": weight, "bias": bias, "residual": residual, "scale": scale, "shift": shift}
    )
    if x.dim() != 4:
        raise ValueError(f"conv2d: x has shape {shape_text(x.shape)}, expected [N, C, H, W]")
    if weight.dim() != 4:
        raise ValueError(
            f"conv2d: weight has shape {shape_text(weight.shape)}, expected [K, C / groups, R, S]"
        )
    batch, channels = x.shape[:2]
    filters, group_channels, *kernel = weight.shape
    check_channels("conv2d", x=channels, weight=filters)
    if groups < 1 or channels % groups or filters % groups:
        raise ValueError(
            f"conv2d: groups {groups} must divide x's {channels} channels and weight's {filters} filters"
        )
    if group_channels * groups != channels:
        raise ValueError(
            f"conv2d: weight has shape {shape_text(weight.shape)}, expected [K, {channels // groups}, R, S] "
            f"(x has {channels} channels, groups is {groups})"
        )
    out_size = check_window("conv2d", x, kernel, stride, padding, dilation)
    shape = [batch, filters, *out_size]
    check_epilogue("conv2d", shape, bias=bias, residual=residual, scale=scale, shift=shift, channel_dim=1)
    return shape


def _fake(
    x, weight, bias, residual, scale, shift, stride, padding, dilation, groups, act, backend, norm_eps=None
):
    geometry = (stride, padding, dilation, groups)
    return empty_nhwc(check_arguments(x, weight, bias, residual, scale, shift, *geometry, act, norm_eps), x)


def _run(
    x, weight, bias, residual, scale, shift, stride, padding, dilation, groups, act, backend, norm_eps=None
):
    shape = check_arguments(
        x, weight, bias, residual, scale, shift, stride, padding, dilation, groups, act, norm_eps
    )
    depthwise = groups == x.shape[1] == weight.shape[0]

    def refusal() -> str | None:
        if norm_eps is None or (depthwise and groups <= _MAX_NORM_CHANNELS):
            return None
        return f"norm_eps for {groups} groups of {shape_text(weight.shape)} (expected depthwise, at most 2048 channels)"

    triton = runs_triton("conv2d", backend, x, refusal)
    if 0 in shape:
        return empty_nhwc(shape, x)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    if not triton:
        options = {"groups": groups, "act": act, "norm_eps": norm_eps}
        return dense_nhwc(conv2d_reference(x, weight, bias, residual, scale, shift, **geometry, **options))
    bias, scale, shift = contiguous(bias, scale, shift)
    residual = None if residual is None else nhwc(residual)
    if depthwise:
        from depthfuse.kernels.depthwise import depthwise_conv2d

        tail = (bias, residual, scale, shift)
        options = {"act": act, "norm_eps": norm_eps}
        return depthwise_conv2d(nhwc(x), depthwise_weight(weight), *tail, **geometry, **options)
    from depthfuse.kernels.conv2d import conv2d as triton_conv2d
    from depthfuse.kernels.conv2d import is_packed

    weight = weight if is_packed(weight) else nhwc(weight)
    tail = (bias, residual, scale, shift)
    return triton_conv2d(nhwc(x), weight, *tail, **geometry, groups=groups, act=act)


def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return conv2d_flops(x_shape, weight_shape, out_shape)


declare(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str act, str backend, "
    "float? norm_eps=None) -> Tensor",
    fake=_fake,
    run=_run,
    flops=_flops,
)
