"""Depthwise patches: rows of pixels are loaded once, and added to every output of a patch that they reach.

All blocks are float32 [PATCHES, BLOCK_C]; a row of pixels and the sums of a patch are tuples of them.
"""
# ruff: noqa: RUF005  Triton compiles no starred expressions, so tuples are concatenated.

import triton
import triton.language as tl

from depthfuse.kernels.device.epilogue import finish, normalize


@triton.jit
def load_row(x, offset, mask, in_left, width, CHANNELS: tl.constexpr, IN_W: tl.constexpr):
    """IN_W neighbouring pixels; zero left and right of the image."""
    row = ()
    for j in tl.static_range(IN_W):
        iw = in_left + j
        inside = mask & ((iw >= 0) & (iw < width))[:, None]
        pixel = tl.load(x + offset + j * CHANNELS, mask=inside, other=0.0).to(tl.float32)
        row = row + (pixel,)
    return row


@triton.jit
def add_row(
    sums,
    row,
    w_row,
    channel_mask,
    FIRST: tl.constexpr,
    S: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_W: tl.constexpr,
    W_STRIDE_TAP: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Add one input row, through one kernel row, to the PATCH_W sums that start at index FIRST."""
    for s in tl.static_range(S):
        w = tl.load(w_row + s * W_STRIDE_TAP, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
        for b in tl.static_range(PATCH_W):
            total = sums[FIRST + b] + row[b * STRIDE_W + s * DILATION_W] * w
            sums = sums[: FIRST + b] + (total,) + sums[FIRST + b + 1 :]
    return sums


@triton.jit
def first_sums(bias, channel, channel_mask, PATCHES: tl.constexpr, OUTPUTS: tl.constexpr):
    """What the sums of a patch's OUTPUTS start from: the bias, or zero."""
    initial = tl.zeros((PATCHES, channel.shape[0]), dtype=tl.float32)
    if bias is not None:
        initial += tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return (initial,) * OUTPUTS


@triton.jit
def filter_row(
    sums,  # PATCH_W
    x,
    weight,
    x_base,  # [PATCHES] offset of the patch's first input pixel
    exists,  # [PATCHES]
    in_top,  # [PATCHES] its row
    in_left,  # [PATCHES] its column
    height,
    width,
    channel,  # [BLOCK_C]
    channel_mask,  # [BLOCK_C]
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    W_STRIDE_C: tl.constexpr,
    W_STRIDE_TAP: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Patches of one row of outputs: a loop over the kernel's rows."""
    IN_W: tl.constexpr = (PATCH_W - 1) * STRIDE_W + (S - 1) * DILATION_W + 1  # input columns under a patch
    for r in range(R):
        ih = in_top + r * DILATION_H
        mask = (exists & (ih >= 0) & (ih < height))[:, None] & channel_mask[None, :]
        offset = (x_base + r * DILATION_H * width * CHANNELS)[:, None] + channel[None, :]
        row = load_row(x, offset, mask, in_left, width, CHANNELS, IN_W)
        w_row = weight + r * S * W_STRIDE_TAP + channel * W_STRIDE_C
        sums = add_row(sums, row, w_row, channel_mask, 0, S, STRIDE_W, DILATION_W, W_STRIDE_TAP, PATCH_W)
    return sums


@triton.jit
def filter_rows(
    sums,  # PATCH_H * PATCH_W, row by row
    x,
    weight,
    x_base,  # as above
    exists,
    in_top,
    in_left,
    height,
    width,
    channel,
    channel_mask,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    W_STRIDE_C: tl.constexpr,
    W_STRIDE_TAP: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Patches of several rows of outputs: every input row once, unrolled whole."""
    IN_H: tl.constexpr = (PATCH_H - 1) * STRIDE_H + (R - 1) * DILATION_H + 1  # input rows under a patch
    IN_W: tl.constexpr = (PATCH_W - 1) * STRIDE_W + (S - 1) * DILATION_W + 1
    for i in tl.static_range(IN_H):
        ih = in_top + i
        mask = (exists & (ih >= 0) & (ih < height))[:, None] & channel_mask[None, :]
        offset = (x_base + i * width * CHANNELS)[:, None] + channel[None, :]
        row = load_row(x, offset, mask, in_left, width, CHANNELS, IN_W)
        for a in tl.static_range(PATCH_H):
            # Output row a reads input row i through the kernel's row r where a * STRIDE_H + r * DILATION_H == i.
            if (
                i >= a * STRIDE_H
                and (i - a * STRIDE_H) % DILATION_H == 0
                and (i - a * STRIDE_H) // DILATION_H < R
            ):
                w_row = weight + (i - a * STRIDE_H) // DILATION_H * S * W_STRIDE_TAP + channel * W_STRIDE_C
                sums = add_row(
                    sums,
                    row,
                    w_row,
                    channel_mask,
                    a * PATCH_W,
                    S,
                    STRIDE_W,
                    DILATION_W,
                    W_STRIDE_TAP,
                    PATCH_W,
                )
    return sums


@triton.jit
def output_at(
    y_base, p, q, step, exists, out_height, out_width, channel, channel_mask, CHANNELS: tl.constexpr
):
    """Offsets and mask, [PATCHES, BLOCK_C], of the output pixels (p, q), `step` pixels after their patch's first."""
    offset = (y_base + step * CHANNELS)[:, None] + channel[None, :]
    mask = (exists & (p < out_height) & (q < out_width))[:, None] & channel_mask[None, :]
    return offset, mask


@triton.jit
def finish_patch(
    sums,  # PATCH_H * PATCH_W
    y_base,  # [PATCHES] offset of the patch's first output pixel
    top,  # [PATCHES] its row
    left,  # [PATCHES] its column
    exists,  # [PATCHES]
    out_height,
    out_width,
    channel,
    channel_mask,
    residual,
    scale,
    shift,
    CHANNELS: tl.constexpr,
    NORM_EPS: tl.constexpr,  # None: no normalisation
    ACTIVATION: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The sums through LayerNorm and the tail, each rounded to TYPE."""
    results = ()
    for a in tl.static_range(PATCH_H):
        for b in tl.static_range(PATCH_W):
            offset, mask = output_at(
                y_base,
                top + a,
                left + b,
                a * out_width + b,
                exists,
                out_height,
                out_width,
                channel,
                channel_mask,
                CHANNELS,
            )
            total = sums[a * PATCH_W + b]
            if NORM_EPS is not None:
                tl.static_assert(channel.shape[0] >= CHANNELS, "LayerNorm needs all channels in one program")
                total = normalize(total, channel_mask, CHANNELS, NORM_EPS)
            total = finish(
                total, None, residual, scale, shift, channel, channel_mask, offset, mask, ACTIVATION
            )
            results = results + (total.to(TYPE),)
    return results


@triton.jit
def store_patch(
    results,  # PATCH_H * PATCH_W
    y,
    y_base,  # as above
    top,
    left,
    exists,
    out_height,
    out_width,
    channel,
    channel_mask,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """Write a patch's outputs, those within the image."""
    for a in tl.static_range(PATCH_H):
        for b in tl.static_range(PATCH_W):
            offset, mask = output_at(
                y_base,
                top + a,
                left + b,
                a * out_width + b,
                exists,
                out_height,
                out_width,
                channel,
                channel_mask,
                CHANNELS,
            )
            tl.store(y + offset, results[a * PATCH_W + b], mask=mask)
