"""Dense 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3): the op `depthfuse::winograd_conv2d`.

    y = scale * act(conv2d(x, w) + bias + residual) + shift

The same as `depthfuse::conv2d`, from weights that `depthfuse.kernels.winograd.pack_weight` transformed ahead of time:
another candidate where products are the limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.ops.backend import product_refusal
from depthfuse.ops.checks import check_channels, check_same_kind, check_shape, check_tail, shape_text
from depthfuse.ops.conv2d import as_pair, check_window, conv2d_flops, conv2d_reference
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import IMAGES, image_tail, nhwc


def winograd_conv2d(
    x: Tensor,  # [N, C, H, W]
    packed: Tensor,  # [16, K, C]
    bias: Tensor | None = None,  # [K]
    residual: Tensor | None = None,  # [N, K, P, Q], the output's shape
    scale: Tensor | None = None,  # [K]
    shift: Tensor | None = None,  # [K]
    *,
    padding: int | Sequence[int] = 1,
    act: str = "none",
    backend: str = "auto",
) -> Tensor:
    """scale * act(conv2d(x, w) + bias + residual) + shift for a 3x3 w of stride 1, without autograd.

    Args:
        x: [N, C, H, W], any strides; channels_last is read in place, anything else is copied first. N may be 0.
        packed: [16, K, C] from `depthfuse.kernels.winograd.pack_weight`; bias, scale, shift: [K] or None; residual:
            [N, K, P, Q] or None. All of x's dtype and on its device.
        padding: one integer or (height, width).
        act: "none", "relu", "relu6", "gelu", "gelu_tanh", "silu" or "hardswish".
        backend: "auto", "triton" or "reference", see `depthfuse.ops.resolve_backend`.

    Returns:
        [N, K, P, Q] in channels_last. In 16-bit dtypes it errs a few times more than `conv2d` does.

    Raises:
        ValueError: shapes, devices or names that do not fit. TypeError: dtypes that do not. BackendError.
    """
    return torch.ops.depthfuse.winograd_conv2d(
        x, packed, bias, residual, scale, shift, as_pair(padding), act, backend
    )


def winograd_conv2d_reference(x: Tensor, packed: Tensor, tail: Tail, window: Window) -> Tensor:
    """The op in plain PyTorch, as a convolution by the weights that `packed` was made from."""
    # The inverse of G on its range: w0 = U0, w1 = U1 - U2, w2 = U3.
    back = packed.new_tensor([[1, 0, 0, 0], [0, 1, -1, 0], [0, 0, 0, 1]])
    transformed = packed.view(4, 4, *packed.shape[1:])
    weight = torch.einsum("ri,ijkc,sj->kcrs", back, transformed, back)
    return conv2d_reference(x, weight, tail, window)


def check_arguments(x: Tensor, packed: Tensor, tail: Tail, window: Window) -> list[int]:
    """Check everything that `winograd_conv2d` promises to check; returns the output's shape."""
    op = "winograd_conv2d"
    check_same_kind(op, x, {"packed": packed, **tail.tensors()})
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {shape_text(x.shape)}, expected [N, C, H, W]")
    if packed.dim() != 3:
        raise ValueError(
            f"{op}: packed has shape {shape_text(packed.shape)}, expected [16, K, C] from pack_weight"
        )
    channels, outputs = x.shape[1], packed.shape[1]
    check_channels(op, x=channels, packed=outputs)
    check_shape(op, "packed", packed, [16, outputs, channels], f"x has {channels} channels")
    shape = [x.shape[0], outputs, *check_window(op, x, (3, 3), window)]
    check_tail(op, shape, tail, channel_dim=1)
    return shape


def _triton(x: Tensor, packed: Tensor, tail: Tail, window: Window) -> Tensor:
    from depthfuse.kernels.winograd import winograd_conv2d as triton_winograd

    return triton_winograd(nhwc(x), packed.contiguous(), image_tail(tail), window)


def _flops(x_shape, packed_shape, *args, out_shape=None, **kwargs) -> int:
    # Of the convolution that it stands for, as every other count is: the point is to do fewer.
    return conv2d_flops(x_shape, (packed_shape[1], packed_shape[2], 3, 3), out_shape)


declare(
    "winograd_conv2d(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, Tensor? scale, Tensor? shift, "
    "SymInt[2] padding, str act, str backend) -> Tensor",
    values={"tail": Tail, "window": Window},
    layout=IMAGES,
    check=check_arguments,
    refusal=lambda x, **rest: product_refusal(x.dtype),
    reference=winograd_conv2d_reference,
    triton=_triton,
    flops=_flops,
)
