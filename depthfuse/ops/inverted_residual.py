"""Expand 1x1, depthwise, project 1x1 and skip of a MobileNetV2 block as one op: `depthfuse::inverted_residual`.

    y = scale * act(w3 * d + b3 + residual) + shift
    with  d = act_inner(depthwise(e, w2) + b2)  and  e = act_inner(w1 * x + b1), zero outside the image

The padding is that which keeps the image's size at stride 1. See `depthfuse.ops.conv2d` for the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthfuse.kernels.arguments import POINTWISE, Tail, ThreeLayers, Window
from depthfuse.ops.activations import activation
from depthfuse.ops.backend import product_refusal
from depthfuse.ops.checks import check_channels, check_same_kind, check_shape, check_tail, shape_text
from depthfuse.ops.conv2d import conv2d_flops, conv2d_reference
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import IMAGES, contiguous, depthwise_weight, image_tail, nhwc


def inverted_residual(
    x: Tensor,  # [N, C, H, W]
    w1: Tensor,  # [hidden, C, 1, 1]
    b1: Tensor,  # [hidden]
    w2: Tensor,  # [hidden, 1, R, R], R odd
    b2: Tensor,  # [hidden]
    w3: Tensor,  # [K, hidden, 1, 1]
    b3: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [N, K, P, Q], the output's shape; x itself where the block has a skip
    scale: Tensor | None = None,  # [K]
    shift: Tensor | None = None,  # [K]
    *,
    stride: int = 1,
    act_inner: str = "relu6",
    act: str = "none",
    backend: str = "auto",
) -> Tensor:
    """An inverted residual block, without autograd; the formula is at this file's head.

    Args:
        x: [N, C, H, W], any strides; channels_last is read in place, anything else is copied first. N may be 0.
        w1: [hidden, C, 1, 1]; b1, b2: [hidden]; w2: [hidden, 1, R, R], R odd, fastest as
            `depthfuse.kernels.depthwise.pack_weight` stores it; w3: [K, hidden, 1, 1]; b3, scale, shift: [K] or None;
            residual: [N, K, P, Q] or None. All of x's dtype and on its device.
        stride: of the depthwise convolution.
        act_inner, act: "none", "relu", "relu6", "gelu", "gelu_tanh", "silu" or "hardswish".
        backend: "auto", "triton" or "reference". The kernel takes R = 3, stride 1 or 2 and at most 64 channels in and
            out; for others "auto" takes the reference.

    Returns:
        [N, K, P, Q] in channels_last, with P = ceil(H / stride) and Q = ceil(W / stride).

    Raises:
        ValueError: shapes, devices or names that do not fit. TypeError: dtypes that do not. BackendError.
    """
    return torch.ops.depthfuse.inverted_residual(
        x, w1, b1, w2, b2, w3, b3, residual, scale, shift, stride, act_inner, act, backend
    )


def inverted_residual_reference(
    x: Tensor, weights: ThreeLayers, tail: Tail, stride: int, act_inner: str
) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does."""
    w1, b1, w2, b2, w3 = weights
    filtering = Window((stride, stride), (w2.shape[-1] // 2,) * 2, groups=w2.shape[0])
    expanded = conv2d_reference(x, w1, Tail(b1, act=act_inner), POINTWISE)
    filtered = conv2d_reference(expanded, w2, Tail(b2, act=act_inner), filtering)
    return conv2d_reference(filtered, w3, tail, POINTWISE)


def check_arguments(x: Tensor, weights: ThreeLayers, tail: Tail, stride: int, act_inner: str) -> list[int]:
    """Check everything that `inverted_residual` promises to check; returns the output's shape."""
    op = "inverted_residual"
    activation(act_inner)
    check_same_kind(op, x, {**weights._asdict(), **tail.tensors("b3")})
    w1, b1, w2, b2, w3 = weights
    for name, tensor, form in (
        ("x", x, "[N, C, H, W]"),
        ("w1", w1, "[hidden, C, 1, 1]"),
        ("w2", w2, "[hidden, 1, R, R]"),
        ("w3", w3, "[K, hidden, 1, 1]"),
    ):
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {shape_text(tensor.shape)}, expected {form}")
    batch, channels, height, width = x.shape
    hidden, outputs, kernel = w1.shape[0], w3.shape[0], w2.shape[-1]
    check_channels(op, x=channels, w1=hidden, w3=outputs)
    check_shape(op, "w1", w1, [hidden, channels, 1, 1], f"x has {channels} channels")
    check_shape(op, "w2", w2, [hidden, 1, kernel, kernel], f"w1 has {hidden} filters, and kernels are square")
    check_shape(op, "w3", w3, [outputs, hidden, 1, 1], f"w1 has {hidden} filters")
    for name, bias in (("b1", b1), ("b2", b2)):
        check_shape(op, name, bias, [hidden], f"w1 has {hidden} filters")
    if kernel % 2 == 0:
        raise ValueError(f"{op}: w2 has shape {shape_text(w2.shape)}, expected an odd kernel size")
    if stride < 1:
        raise ValueError(f"{op}: stride is {stride}, expected at least 1")
    if min(height, width) < 1:
        raise ValueError(f"{op}: x has shape {shape_text(x.shape)}, expected at least one pixel")
    shape = [batch, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1]
    check_tail(op, shape, tail, channel_dim=1, bias="b3")
    return shape


def refusal(x: Tensor, weights: ThreeLayers, stride: int, **rest) -> str | None:
    """What the kernel does not take of a call, in words, or None."""
    from depthfuse.kernels.inverted_residual import supports

    size = (weights.w1.shape[1], weights.w3.shape[0], weights.w2.shape[-1], stride)
    if supports(*size):
        return product_refusal(x.dtype)
    return "{} -> {} channels, kernel {}, stride {}".format(*size)


def _triton(x: Tensor, weights: ThreeLayers, tail: Tail, stride: int, act_inner: str) -> Tensor:
    from depthfuse.kernels.inverted_residual import inverted_residual as triton_inverted_residual

    w1, b1, w2, b2, w3 = weights
    b1, b2 = contiguous(b1, b2)
    weights = ThreeLayers(nhwc(w1), b1, depthwise_weight(w2), b2, nhwc(w3))
    return triton_inverted_residual(nhwc(x), weights, image_tail(tail), stride=stride, act_inner=act_inner)


def _flops(x_shape, w1_shape, b1_shape, w2_shape, b2_shape, w3_shape, *args, out_shape=None, **kwargs) -> int:
    batch, _, height, width = x_shape
    size = out_shape[2:]
    expand = conv2d_flops(x_shape, w1_shape, (batch, w1_shape[0], height, width))
    filtered = conv2d_flops(None, w2_shape, (batch, w1_shape[0], *size))
    return expand + filtered + conv2d_flops(None, w3_shape, out_shape)


declare(
    "inverted_residual(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor? b3, "
    "Tensor? residual, Tensor? scale, Tensor? shift, SymInt stride, str act_inner, str act, str backend) -> Tensor",
    values={"weights": ThreeLayers, "tail": Tail},
    bias="b3",
    layout=IMAGES,
    check=check_arguments,
    refusal=refusal,
    reference=inverted_residual_reference,
    triton=_triton,
    flops=_flops,
)
