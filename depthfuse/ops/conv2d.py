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

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.ops.activations import finish
from depthfuse.ops.backend import product_refusal
from depthfuse.ops.checks import check_channels, check_norm_eps, check_same_kind, check_tail, shape_text
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import IMAGES, depthwise_weight, image_tail, nhwc

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
    x: Tensor, weight: Tensor, tail: Tail, window: Window, norm_eps: float | None = None
) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does. Shapes as in `conv2d`."""
    y = F.conv2d(x, weight, tail.bias, *window)
    if norm_eps is not None:
        y = F.layer_norm(y.permute(0, 2, 3, 1), (y.shape[1],), eps=norm_eps).permute(0, 3, 1, 2)
    return finish(y, tail, (1, -1, 1, 1))


def conv2d_flops(x_shape, weight_shape, output_shape) -> int:
    """2 * N * P * Q * K * (C / groups) * R * S: a multiplication and an addition a tap, as PyTorch counts
    conv2d.
    """
    batch, _, height, width = output_shape
    filters, group_channels, kernel_h, kernel_w = weight_shape
    return 2 * batch * height * width * filters * group_channels * kernel_h * kernel_w


def as_pair(value: int | Sequence[int]) -> list[int]:
    """One integer for both axes, or (height, width). Raises ValueError for anything else."""
    pair = [value, value] if isinstance(value, int | torch.SymInt) else list(value)
    if len(pair) != 2:
        raise ValueError(f"expected one integer or two (height, width), got {value}")
    return pair


def check_window(op: str, x: Tensor, kernel: Sequence[int], window: Window) -> list[int]:
    """Raise ValueError for a geometry that does not fit x [N, C, H, W]; returns the output's height and width."""
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        pair = getattr(window, name)
        if min(pair) < least:
            raise ValueError(f"{op}: {name} is {tuple(pair)}, expected at least {least}")
    size = window.output_size(x.shape[2:], kernel)
    if min(size) < 1:
        raise ValueError(
            f"{op}: x of {shape_text(x.shape)} is smaller than the kernel {shape_text(kernel)} with "
            f"padding {tuple(window.padding)} and dilation {tuple(window.dilation)}"
        )
    return size


def check_arguments(
    x: Tensor, weight: Tensor, tail: Tail, window: Window, norm_eps: float | None = None
) -> list[int]:
    """Check everything that `conv2d` promises to check; returns the output's shape."""
    check_norm_eps("conv2d", norm_eps)
    check_same_kind("conv2d", x, {"weight": weight, **tail.tensors()})
    if x.dim() != 4:
        raise ValueError(f"conv2d: x has shape {shape_text(x.shape)}, expected [N, C, H, W]")
    if weight.dim() != 4:
        raise ValueError(
            f"conv2d: weight has shape {shape_text(weight.shape)}, expected [K, C / groups, R, S]"
        )
    batch, channels = x.shape[:2]
    filters, group_channels, *kernel = weight.shape
    groups = window.groups
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
    shape = [batch, filters, *check_window("conv2d", x, kernel, window)]
    check_tail("conv2d", shape, tail, channel_dim=1)
    return shape


def is_depthwise(weight: Tensor, groups: int) -> bool:
    """Whether `weight` [K, C / groups, R, S] is one filter for each channel."""
    return weight.shape[0] == groups and weight.shape[1] == 1


def refusal(x: Tensor, weight: Tensor, tail: Tail, window: Window, norm_eps: float | None) -> str | None:
    """What the kernels do not take of a call, in words, or None."""
    depthwise = is_depthwise(weight, window.groups)
    if norm_eps is None or (depthwise and window.groups <= _MAX_NORM_CHANNELS):
        return None if depthwise else product_refusal(x.dtype)
    return (
        f"norm_eps for {window.groups} groups of {shape_text(weight.shape)} "
        f"(expected depthwise, at most {_MAX_NORM_CHANNELS} channels)"
    )


def _triton(x: Tensor, weight: Tensor, tail: Tail, window: Window, norm_eps: float | None) -> Tensor:
    tail = image_tail(tail)
    if is_depthwise(weight, window.groups):
        from depthfuse.kernels.depthwise import depthwise_conv2d

        return depthwise_conv2d(nhwc(x), depthwise_weight(weight), tail, window, norm_eps=norm_eps)
    from depthfuse.kernels.conv2d import conv2d as triton_conv2d
    from depthfuse.kernels.conv2d import is_packed, is_readable

    x = x if is_readable(x, weight) else nhwc(x)
    return triton_conv2d(x, weight if is_packed(weight) else nhwc(weight), tail, window)


def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return conv2d_flops(x_shape, weight_shape, out_shape)


declare(
    "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str act, str backend, "
    "float? norm_eps=None) -> Tensor",
    values={"tail": Tail, "window": Window},
    layout=IMAGES,
    check=check_arguments,
    refusal=refusal,
    reference=conv2d_reference,
    triton=_triton,
    flops=_flops,
)
