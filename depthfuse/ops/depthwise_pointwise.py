"""Depthwise convolution and the 1x1 convolution behind it as one op: `depthfuse::depthwise_pointwise`.

    y = scale * act(w2 * act_inner(depthwise(x, w1) + b1) + b2 + residual) + shift

A ConvNeXt block merged in its factorised form, and a depthwise separable block. See `depthfuse.ops.conv2d` for the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depthfuse.kernels.arguments import POINTWISE, Tail, TwoLayers, Window
from depthfuse.ops.activations import activation
from depthfuse.ops.backend import product_refusal
from depthfuse.ops.checks import check_channels, check_same_kind, check_shape, check_tail, shape_text
from depthfuse.ops.conv2d import as_pair, check_window, conv2d_flops, conv2d_reference
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import IMAGES, contiguous, depthwise_weight, image_tail, nhwc


def depthwise_pointwise(
    x: Tensor,  # [N, C, H, W]
    w1: Tensor,  # [C, 1, R, S]
    b1: Tensor | None,  # [C]
    w2: Tensor,  # [K, C, 1, 1]
    b2: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [N, K, P, Q], the output's shape
    scale: Tensor | None = None,  # [K]
    shift: Tensor | None = None,  # [K]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    act_inner: str = "none",
    act: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Depthwise then 1x1 convolution, without autograd; the formula is at this file's head.

    Args:
        x: [N, C, H, W], any strides; channels_last is read in place, anything else is copied first. N may be 0.
        w1: [C, 1, R, S], fastest as `depthfuse.kernels.depthwise.pack_weight` stores it; b1: [C] or None;
            w2: [K, C, 1, 1]; b2, scale, shift: [K] or None; residual: [N, K, P, Q] or None. All of x's dtype and on
            its device.
        stride, padding, dilation: of the depthwise convolution; one integer or (height, width).
        act_inner, act: "none", "relu", "relu6", "gelu", "gelu_tanh", "silu" or "hardswish".
        backend: "auto", "triton" or "reference". The kernel takes at most 256 outputs K; beyond, "auto" takes the
            reference.

    Returns:
        [N, K, P, Q] in channels_last.

    Raises:
        ValueError: shapes, devices or names that do not fit. TypeError: dtypes that do not. BackendError.
    """
    geometry = (as_pair(stride), as_pair(padding), as_pair(dilation))
    return torch.ops.depthfuse.depthwise_pointwise(
        x, w1, b1, w2, b2, residual, scale, shift, *geometry, act_inner, act, backend
    )


def depthwise_pointwise_reference(
    x: Tensor, weights: TwoLayers, tail: Tail, window: Window, act_inner: str
) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does."""
    first = Tail(weights.b1, act=act_inner)
    filtered = conv2d_reference(x, weights.w1, first, window._replace(groups=x.shape[1]))
    return conv2d_reference(filtered, weights.w2, tail, POINTWISE)


def check_arguments(x: Tensor, weights: TwoLayers, tail: Tail, window: Window, act_inner: str) -> list[int]:
    """Check everything that `depthwise_pointwise` promises to check; returns the output's shape."""
    op = "depthwise_pointwise"
    activation(act_inner)
    check_same_kind(op, x, {**weights._asdict(), **tail.tensors("b2")})
    w1, b1, w2 = weights
    for name, tensor, form in (
        ("x", x, "[N, C, H, W]"),
        ("w1", w1, "[C, 1, R, S]"),
        ("w2", w2, "[K, C, 1, 1]"),
    ):
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {shape_text(tensor.shape)}, expected {form}")
    batch, channels = x.shape[:2]
    outputs, kernel = w2.shape[0], w1.shape[2:]
    check_channels(op, x=channels, w2=outputs)
    check_shape(op, "w1", w1, [channels, 1, *kernel], f"x has {channels} channels")
    check_shape(op, "b1", b1, [channels], f"x has {channels} channels")
    check_shape(op, "w2", w2, [outputs, channels, 1, 1], f"x has {channels} channels")
    shape = [batch, outputs, *check_window(op, x, kernel, window)]
    check_tail(op, shape, tail, channel_dim=1, bias="b2")
    return shape


def refusal(x: Tensor, weights: TwoLayers, **rest) -> str | None:
    """What the kernel does not take of a call, in words, or None."""
    from depthfuse.kernels.depthwise_pointwise import supports

    outputs = weights.w2.shape[0]
    return product_refusal(x.dtype) if supports(outputs) else f"{outputs} output channels"


def _triton(x: Tensor, weights: TwoLayers, tail: Tail, window: Window, act_inner: str) -> Tensor:
    from depthfuse.kernels.depthwise_pointwise import depthwise_pointwise as triton_depthwise_pointwise

    w1, b1, w2 = weights
    weights = TwoLayers(depthwise_weight(w1), *contiguous(b1), nhwc(w2))
    return triton_depthwise_pointwise(nhwc(x), weights, image_tail(tail), window, act_inner=act_inner)


def _flops(x_shape, w1_shape, b1_shape, w2_shape, *args, out_shape=None, **kwargs) -> int:
    filtered = conv2d_flops(None, w1_shape, (out_shape[0], w1_shape[0], *out_shape[2:]))
    return filtered + conv2d_flops(None, w2_shape, out_shape)


declare(
    "depthwise_pointwise(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, Tensor? scale, "
    "Tensor? shift, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str act_inner, str act, str backend) "
    "-> Tensor",
    values={"weights": TwoLayers, "tail": Tail, "window": Window},
    bias="b2",
    layout=IMAGES,
    check=check_arguments,
    refusal=refusal,
    reference=depthwise_pointwise_reference,
    triton=_triton,
    flops=_flops,
)
