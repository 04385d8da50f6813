"""Depthwise convolution and the 1x1 convolution behind it, in one launch.

    d[c] = act_inner(sum_{r,s} x[c, shifted by r, s] * w1[c, r, s] + b1[c])
    y[k] = scale[k] * act(sum_c d[c] * w2[k, c] + b2[k] + residual[k]) + shift[k]

This is a ConvNeXt block merged in its factorised form (7x7, 1x1, the skip beside both), and a depthwise separable
block. Two launches write d and read it again, which is half of all that they move. Here d never leaves the chip: for
BLOCK_C channels at a time a program filters its pixels as depthwise.py does, rows sliding through registers, and
adds their share of the 1x1 product to the accumulator, which holds all output channels of these pixels.

So the outputs must fit one program (MAX_OUT_CHANNELS): with more, either the filtering would be done again for each
group of outputs, or the tile's rows would be too few to reuse the weights. Wider layers are two launches.
"""
# ruff: noqa: RUF005  Triton compiles no starred expressions, so tuples are concatenated.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from depthfuse.kernels.arguments import NO_TAIL, POINTWISE, Tail, TwoLayers, Window
from depthfuse.kernels.depthwise import require_taps
from depthfuse.kernels.device.epilogue import activate, finish
from depthfuse.kernels.device.patches import join_positions
from depthfuse.kernels.device.rows import filter_row, first_sums
from depthfuse.kernels.launch import (
    Launch,
    Target,
    ceil_div,
    compiler_options,
    empty_image,
    needs_wide_offsets,
    next_power_of_2,
    require_channels_last,
    require_rows,
    require_tail,
    target_of,
)
from depthfuse.kernels.tuning.lookup import tuned

MAX_OUT_CHANNELS = 256


@dataclass(frozen=True)
class DepthwisePointwiseConfig:
    """One program of a depthwise and a 1x1 convolution.

    Attributes:
        patch_w: neighbouring outputs that share loaded pixels, a power of 2; each costs a sum in registers.
        patches: patches a program; patches x patch_w are the rows of the matrix product.
        block_c: channels a step: 32 is the least depth that keeps the matrix units busy, and more would not fit beside
            the accumulator.
        num_warps: as many as keep the accumulator, rows x output channels, within half of the registers.
    """

    patch_w: int
    patches: int
    block_c: int
    num_warps: int

    def options(self, target: Target) -> dict:
        """Compiler options on `target`. One stage: the product's left operand is computed, not loaded."""
        return compiler_options(target, self.num_warps, 1, nonkdim=16, kpack=2)


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def depthwise_pointwise_kernel(
    x,  # [N, H, W, CHANNELS]
    w1,  # [CHANNELS, R, S], strides W1_STRIDE_C and W1_STRIDE_TAP
    b1,  # [CHANNELS] or None
    w2,  # [OUT_CHANNELS, CHANNELS]
    b2,  # [OUT_CHANNELS] or None
    residual,  # like y, or None
    scale,  # [OUT_CHANNELS] or None
    shift,  # [OUT_CHANNELS] or None
    y,  # [N, P, Q, OUT_CHANNELS]
    batch,  # N
    height,  # H
    width,  # W
    out_height,  # P
    out_width,  # Q
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    W1_STRIDE_C: tl.constexpr,
    W1_STRIDE_TAP: tl.constexpr,
    ACT_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    PATCH_W: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    patches_w = tl.cdiv(out_width, PATCH_W)
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    image = patch // (out_height * patches_w)
    if WIDE:
        image = image.to(tl.int64)
    in_top = patch // patches_w % out_height * STRIDE_H - PADDING_H
    in_left = patch % patches_w * PATCH_W * STRIDE_W - PADDING_W
    exists = image < batch
    x_base = ((image * height + in_top) * width + in_left) * CHANNELS

    n = tl.arange(0, BLOCK_N)
    n_mask = n < OUT_CHANNELS
    acc = tl.zeros((PATCHES * PATCH_W, BLOCK_N), dtype=tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        channel_mask = channel < CHANNELS
        sums = filter_row(
            first_sums(b1, channel, channel_mask, PATCHES, PATCH_W),
            x,
            w1,
            x_base,
            exists,
            in_top,
            in_left,
            height,
            width,
            channel,
            channel_mask,
            CHANNELS,
            R,
            S,
            STRIDE_W,
            DILATION_H,
            DILATION_W,
            W1_STRIDE_C,
            W1_STRIDE_TAP,
            PATCH_W,
        )
        filtered = ()
        for i in tl.static_range(PATCH_W):
            filtered = filtered + (activate(sums[i], ACT_INNER),)
        rows = tl.permute(join_positions(filtered, PATCH_W), (0, 2, 1)).to(x.dtype.element_ty)
        weight = tl.load(
            w2 + n[:, None] * CHANNELS + channel[None, :],
            mask=n_mask[:, None] & channel_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.reshape(rows, (PATCHES * PATCH_W, BLOCK_C)), weight.T, acc, input_precision="ieee")

    # Rows of the product: every output pixel of every patch.
    row = tl.arange(0, PATCHES * PATCH_W)
    patch = tl.program_id(0) * PATCHES + row // PATCH_W
    image = patch // (out_height * patches_w)
    if WIDE:
        image = image.to(tl.int64)
    p = patch // patches_w % out_height
    q = patch % patches_w * PATCH_W + row % PATCH_W
    offset = ((image * out_height + p) * out_width + q)[:, None] * OUT_CHANNELS + n[None, :]
    mask = ((image < batch) & (q < out_width))[:, None] & n_mask[None, :]
    acc = finish(acc, b2, residual, scale, shift, n, n_mask, offset, mask, ACTIVATION)
    tl.store(y + offset, acc.to(y.dtype.element_ty), mask=mask)


def config_for(out_channels: int, target: Target) -> DepthwisePointwiseConfig:
    """The tile for `out_channels`; every choice is free of spills on every target."""
    if target.backend == "interpreter":
        return DepthwisePointwiseConfig(2, 32, 32, 4)
    if out_channels <= 128:
        return DepthwisePointwiseConfig(4, 16, 32, 4)
    return DepthwisePointwiseConfig(4, 16, 32, 8)


def supports(out_channels: int) -> bool:
    """Whether a pixel's output channels fit one program."""
    return out_channels <= MAX_OUT_CHANNELS


def plan(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weights: TwoLayers,  # [C, 1, R, S] contiguous or from depthwise.pack_weight, [C], [K, C, 1, 1]
    tail: Tail,  # residual [N, K, P, Q] channels_last
    y: torch.Tensor,  # [N, K, P, Q] channels_last
    window: Window,  # of the depthwise convolution, whose groups are C, whatever it says
    *,
    act_inner: str,
    config: DepthwisePointwiseConfig | None,
    target: Target,
) -> Launch:
    """The launch that computes `y`."""
    _, channels, height, width = x.shape
    batch, out_channels, out_height, out_width = y.shape
    w1 = weights.w1
    shape = {
        "pixels": batch * out_height * out_width,
        "channels": channels,
        "out_channels": out_channels,
        "kernel_h": w1.shape[2],
        "kernel_w": w1.shape[3],
        "stride_w": window.stride[1],
    }
    config = config or tuned("depthwise_pointwise", config_for(out_channels, target), x, target, **shape)
    arguments = {
        "x": x,
        **weights._asdict(),
        **tail.tensors("b2"),
        "y": y,
        "batch": batch,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        "CHANNELS": channels,
        "OUT_CHANNELS": out_channels,
        "R": w1.shape[2],
        "S": w1.shape[3],
        **window.constants(),
        "W1_STRIDE_C": w1.stride(0),
        "W1_STRIDE_TAP": w1.stride(3),
        "ACT_INNER": act_inner,
        "ACTIVATION": tail.act,
        "WIDE": needs_wide_offsets(x, y),
        "PATCH_W": config.patch_w,
        "PATCHES": config.patches,
        "BLOCK_C": config.block_c,
        "BLOCK_N": max(16, next_power_of_2(out_channels)),
    }
    patches = batch * out_height * ceil_div(out_width, config.patch_w)
    return Launch(
        depthwise_pointwise_kernel, (ceil_div(patches, config.patches),), arguments, config.options(target)
    )


def depthwise_pointwise(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weights: TwoLayers,  # [C, 1, R, S] contiguous or from depthwise.pack_weight, [C], [K, C, 1, 1]
    tail: Tail = NO_TAIL,  # residual [N, K, P, Q] channels_last
    window: Window = POINTWISE,  # of the depthwise convolution, whose groups are C, whatever it says
    *,
    act_inner: str = "none",
    config: DepthwisePointwiseConfig | None = None,
) -> torch.Tensor:  # [N, K, P, Q] channels_last
    """Depthwise convolution, activation, 1x1 convolution with its tail, in one launch; see this file's head.

    float16, bfloat16 or float32 in and out, float32 sums; the filtered tensor is rounded to the dtype of `x`.
    `config` None takes `config_for`'s choice. That the arguments fit each other, and K `supports`, is for the caller to
    check, as `depthfuse.ops.depthwise_pointwise` does.

    Raises:
        ValueError: a layout other than the above.
    """
    target = target_of(x)
    require_channels_last(x=x, w2=weights.w2)
    require_taps(w1=weights.w1)
    require_rows(b1=weights.b1)
    require_tail(tail, require_channels_last)
    size = window.output_size(x.shape[2:], weights.w1.shape[2:])
    y = empty_image((x.shape[0], weights.w2.shape[0], *size), x)
    plan(x, weights, tail, y, window, act_inner=act_inner, config=config, target=target).run(x)
    return y
