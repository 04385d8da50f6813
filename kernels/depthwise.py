"""Depthwise 2-d convolution with a fused tail.

    y[n, c, p, q] = scale[c] * act(norm_c(sum_{r,s} x[n, c, p*sh - ph + r*dh, q*sw - pw + s*dw] * w[c, r, s]
                                          + bias[c]) + residual[n, c, p, q]) + shift[c]

where norm is nothing, or (`norm_eps` given) LayerNorm over the channels of a pixel, as in ConvNeXt; its affine is scale
and shift, or belongs in the next layer's weight. A program then holds all channels of its pixels.

There is nothing to multiply as a matrix, so it is bound by memory, or (7x7) by how often each value is loaded again. A
plain kernel loads every input R * S times. Here one program owns patches of PATCH_H x PATCH_W outputs and walks down
their input rows: a row is loaded once into registers and added to every output that it reaches, whose sums stay in
registers too. A 7x7 patch of 1 x 7 takes 91 loads for 7 outputs instead of 343, a 3x3 patch of 2 x 4 takes 24 for 8
instead of 72. Patches of several rows are unrolled whole, which is for small kernels only: the compiler's time
grows with the square of the code. Patches of one row loop over the kernel's rows.

The work is a [PATCHES, BLOCK_C] block: channels are contiguous (channels_last), so that loads are wide, and several
patches share one program so that narrow layers fill their warps.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from depthfuse.kernels.arguments import NO_TAIL, POINTWISE, Tail, Window
from depthfuse.kernels.device.rows import filter_row, filter_rows, finish_patch, first_sums, store_patch
from depthfuse.kernels.launch import (
    Launch,
    Target,
    ceil_div,
    compiler_options,
    empty_image,
    needs_wide_offsets,
    next_power_of_2,
    require_channels_last,
    require_tail,
    target_of,
)
from depthfuse.kernels.tuning.lookup import tuned


@dataclass(frozen=True)
class DepthwiseConfig:
    """One program of a depthwise convolution.

    Attributes:
        patch_h: output rows a patch. Each more row re-uses R - stride loaded rows, for patch_w more sums.
        patch_w: output columns a patch; likewise, and each loaded weight serves patch_w outputs.
        patches: patches side by side in a program: they fill the warps where channels are few.
        block_c: channels a program; 8 a thread are one 16-byte load of a 16-bit type.
        num_warps: one or few: programs share nothing, and small ones spread better over the chip.
    """

    patch_h: int
    patch_w: int
    patches: int
    block_c: int
    num_warps: int

    def options(self, target: Target) -> dict:
        """Compiler options on `target`; there is no loop to pipeline."""
        return compiler_options(target, self.num_warps, 1)


# Image sizes and batch change nothing in the code: one compilation serves them all.
@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def depthwise_kernel(
    x,  # [N, H, W, CHANNELS]
    weight,  # [CHANNELS, R, S], strides W_STRIDE_C and W_STRIDE_TAP
    bias,  # [CHANNELS] or None
    residual,  # like y, or None
    scale,  # [CHANNELS] or None
    shift,  # [CHANNELS] or None
    y,  # [N, P, Q, CHANNELS]
    batch,  # N
    height,  # H
    width,  # W
    out_height,  # P
    out_width,  # Q
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    W_STRIDE_C: tl.constexpr,
    W_STRIDE_TAP: tl.constexpr,
    NORM_EPS: tl.constexpr,  # None: no normalisation
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Blocks of channels run fastest: programs side by side read the same pixels' cache lines.
    BLOCKS_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    channel = program % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < CHANNELS
    patch = program // BLOCKS_C * PATCHES + tl.arange(0, PATCHES)
    patches_w = tl.cdiv(out_width, PATCH_W)
    patches_h = tl.cdiv(out_height, PATCH_H)
    image = patch // (patches_h * patches_w)
    top = patch // patches_w % patches_h * PATCH_H  # first output row of the patch
    left = patch % patches_w * PATCH_W
    if WIDE:
        image = image.to(tl.int64)
    exists = image < batch
    in_top = top * STRIDE_H - PADDING_H
    in_left = left * STRIDE_W - PADDING_W
    x_base = ((image * height + in_top) * width + in_left) * CHANNELS
    y_base = ((image * out_height + top) * out_width + left) * CHANNELS

    sums = first_sums(bias, channel, channel_mask, PATCHES, PATCH_H * PATCH_W)
    if PATCH_H == 1:
        sums = filter_row(
            sums,
            x,
            weight,
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
            W_STRIDE_C,
            W_STRIDE_TAP,
            PATCH_W,
        )
    else:
        sums = filter_rows(
            sums,
            x,
            weight,
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
            STRIDE_H,
            STRIDE_W,
            DILATION_H,
            DILATION_W,
            W_STRIDE_C,
            W_STRIDE_TAP,
            PATCH_H,
            PATCH_W,
        )

    # All tails before the first store: the compiler then loads bias, scale and shift once, not once an output.
    results = finish_patch(
        sums,
        y_base,
        top,
        left,
        exists,
        out_height,
        out_width,
        channel,
        channel_mask,
        residual,
        scale,
        shift,
        CHANNELS,
        NORM_EPS,
        ACTIVATION,
        PATCH_H,
        PATCH_W,
        y.dtype.element_ty,
    )
    store_patch(
        results,
        y,
        y_base,
        top,
        left,
        exists,
        out_height,
        out_width,
        channel,
        channel_mask,
        CHANNELS,
        PATCH_H,
        PATCH_W,
    )


@functools.cache
def config_for(
    channels: int,
    out_width: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    norm: bool,
    dtype: torch.dtype,
    target: Target,
) -> DepthwiseConfig:
    """Patch and block for an output of `channels` and `out_width`; `norm`: with LayerNorm over all channels."""
    unrolled = kernel[0] * kernel[1] <= 9
    if target.backend == "interpreter":
        return DepthwiseConfig(2 if unrolled else 1, 2, 64, next_power_of_2(channels) if norm else 32, 1)
    # A thread takes 8 bytes of channels: with 16 the sums of a useful patch would not fit its registers.
    per_thread = 8 // dtype.itemsize
    if unrolled:
        patch_h, patch_w = (2, 4) if max(stride) == 1 else (2, 2)
    else:
        patch_h, patch_w = 1, 7  # 7 divides the image sizes of these networks: 56, 28, 14, 7
    patch_w = min(patch_w, out_width)
    warp = 64 if target.backend == "hip" else 32
    if norm:
        block_c = next_power_of_2(channels)
        num_warps = max(1, block_c // (warp * per_thread))
    else:
        # The widest block, of at least a cache line, that pads the channels least.
        block_c = min((128, 64, 32), key=lambda block: ceil_div(channels, block) * block)
        num_warps = 1
    patches = max(1, num_warps * warp * per_thread // block_c)
    return DepthwiseConfig(patch_h, patch_w, patches, block_c, num_warps)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """The same [C, 1, R, S] weight, stored [R, S, C]: a tap's channels are then one wide load.

    The kernel takes either storage and only runs faster with this one, so prepare weights once, ahead of time.
    """
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def plan(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weight: torch.Tensor,  # [C, 1, R, S] contiguous, or from pack_weight
    tail: Tail,  # residual [N, C, P, Q] channels_last
    y: torch.Tensor,  # [N, C, P, Q] channels_last
    window: Window,  # whose groups are C, whatever it says
    *,
    norm_eps: float | None,
    config: DepthwiseConfig | None,
    target: Target,
) -> Launch:
    """The launch that computes `y`."""
    _, _, height, width = x.shape
    batch, channels, out_height, out_width = y.shape
    r, s = weight.shape[2:]
    shape = {
        "pixels": batch * out_height * out_width,
        "channels": channels,
        "out_width": out_width,
        "kernel_h": r,
        "kernel_w": s,
        "stride_h": window.stride[0],
        "stride_w": window.stride[1],
        "norm": int(norm_eps is not None),
    }
    if config is None:
        usual = config_for(channels, out_width, (r, s), window.stride, norm_eps is not None, x.dtype, target)
        config = tuned("depthwise_conv2d", usual, x, target, **shape)
    arguments = {
        "x": x,
        "weight": weight,
        **tail.tensors(),
        "y": y,
        "batch": batch,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        "CHANNELS": channels,
        "R": r,
        "S": s,
        **window.constants(),
        "W_STRIDE_C": weight.stride(0),
        "W_STRIDE_TAP": weight.stride(3),
        "NORM_EPS": norm_eps,
        "ACTIVATION": tail.act,
        "WIDE": needs_wide_offsets(x, y),
        "PATCH_H": config.patch_h,
        "PATCH_W": config.patch_w,
        "PATCHES": config.patches,
        "BLOCK_C": config.block_c,
    }
    patches = batch * ceil_div(out_height, config.patch_h) * ceil_div(out_width, config.patch_w)
    grid = (ceil_div(patches, config.patches) * ceil_div(channels, config.block_c),)
    return Launch(depthwise_kernel, grid, arguments, config.options(target))


def require_taps(**weights: torch.Tensor) -> None:
    """Raise ValueError for a [C, 1, R, S] weight whose taps do not lie a fixed stride apart."""
    for name, weight in weights.items():
        if weight.stride(2) != weight.shape[3] * weight.stride(3):
            raise ValueError(
                f"{name} has strides {list(weight.stride())}, expected contiguous or depthwise.pack_weight({name})"
            )


def depthwise_conv2d(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weight: torch.Tensor,  # [C, 1, R, S] contiguous (which is channels_last too), or from pack_weight
    tail: Tail = NO_TAIL,  # residual [N, C, P, Q] channels_last
    window: Window = POINTWISE,  # whose groups are C, whatever it says
    *,
    norm_eps: float | None = None,
    config: DepthwiseConfig | None = None,
) -> torch.Tensor:  # [N, C, P, Q] channels_last
    """Depthwise convolution, LayerNorm where `norm_eps` is given, and its tail in one pass; see this file's head.

    float16, bfloat16 or float32 in and out, float32 sums. `config` None takes `config_for`'s choice. That the arguments
    fit each other is for the caller to check, as `depthfuse.ops.conv2d` does.

    Raises:
        ValueError: a layout other than the above.
    """
    target = target_of(x)
    require_channels_last(x=x)
    require_taps(weight=weight)
    require_tail(tail, require_channels_last)
    size = window.output_size(x.shape[2:], weight.shape[2:])
    y = empty_image((*x.shape[:2], *size), x)
    plan(x, weight, tail, y, window, norm_eps=norm_eps, config=config, target=target).run(x)
    return y
