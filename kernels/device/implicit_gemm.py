"""The product of a convolution as an implicit GEMM: output pixels by output channels, summed over (r, s, c).

The left operand is never written down: its tiles are gathered from the image. Offsets of rows are those of the pixel
under the kernel's first tap (`x_row`, whose image position is `top`, `left`) and of the filter (`w_row`).
"""

import triton
import triton.language as tl

from depthfuse.kernels.device.patches import join_positions
from depthfuse.kernels.device.splitk import part_of
from depthfuse.kernels.device.tile import load_weights, within_reduction


@triton.jit
def gather_flat(
    x,
    x_row,  # [BLOCK_M]
    top,  # [BLOCK_M]
    left,  # [BLOCK_M]
    height,
    width,
    start,  # of the step on the flat axis
    plane,  # elements from one channel to the next; not read where CHANNELS lie side by side
    PIXEL: tl.constexpr,  # elements from one pixel to the next
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,  # whether channels lie `plane` apart
    INTERLEAVE: tl.constexpr,  # neighbours of a step that a thread loads one by one
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One step of the left operand along the flat (r, s, c) axis: [BLOCK_M, BLOCK_K].

    Of 3 channels each element is loaded by itself. On AMD a thread gathers neighbours of one row, so that they go to
    LDS and come back together, and not 16 bits at a time.
    """
    parts = ()
    for j in tl.static_range(INTERLEAVE):
        flat = start + tl.arange(0, BLOCK_K // INTERLEAVE) * INTERLEAVE + j
        row = flat // (S * CHANNELS) * DILATION_H
        column = flat % (S * CHANNELS) // CHANNELS * DILATION_W
        c = flat % CHANNELS
        x_mask = within_reduction(flat, R * S * CHANNELS, BLOCK_K)[None, :]
        if PADDED:
            ih = top[:, None] + row[None, :]
            iw = left[:, None] + column[None, :]
            x_mask = x_mask & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        if PLANES:
            c = c * plane
        x_offset = x_row[:, None] + ((row * width + column) * PIXEL + c)[None, :]
        if (
            CHANNELS % 8 == 0 and not PLANES
        ):  # eight neighbours of the flat axis are one pixel's; older compilers miss it
            x_offset = tl.max_contiguous(tl.multiple_of(x_offset, [1, 8]), [1, 8])
            x_mask = tl.max_constancy(x_mask, [1, 8])
        parts = parts + (tl.load(x + x_offset, mask=x_mask, other=0.0),)  # noqa: RUF005  no starred expressions
    if INTERLEAVE > 1:
        return tl.reshape(join_positions(parts, INTERLEAVE), (BLOCK_M, BLOCK_K))
    else:
        return parts[0]


@triton.jit
def flat_product(
    x,
    weight,
    x_row,  # [BLOCK_M]
    w_row,  # [BLOCK_N]
    top,  # [BLOCK_M]
    left,  # [BLOCK_M]
    height,
    width,
    plane,
    split,
    PIXEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    W_STRIDE: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AMD: tl.constexpr,
):
    """One part of the product, walked along the flat (r, s, c) axis: float32 [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first, last = part_of((R * S * CHANNELS + BLOCK_K - 1) // BLOCK_K, SPLITS, split)
    for i in range(first, last):
        a = gather_flat(
            x,
            x_row,
            top,
            left,
            height,
            width,
            i * BLOCK_K,
            plane,
            PIXEL,
            CHANNELS,
            R,
            S,
            DILATION_H,
            DILATION_W,
            PADDED,
            PLANES,
            INTERLEAVE,
            BLOCK_M,
            BLOCK_K,
        )
        flat = i * BLOCK_K + tl.arange(0, BLOCK_K)
        # What pack_weight put between two filters is zero, and x is masked there: only the next filter must be.
        inside = within_reduction(flat, W_STRIDE, BLOCK_K)
        b = load_weights(weight, w_row, flat, inside, AMD)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def tap_product(
    x,
    weight,
    x_row,  # [BLOCK_M]
    w_row,  # [BLOCK_N]
    top,  # [BLOCK_M]
    left,  # [BLOCK_M]
    height,
    width,
    split,
    PIXEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AMD: tl.constexpr,
):
    """One part of the product, walked tap by tap: float32 [BLOCK_M, BLOCK_N]."""
    STEPS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    step = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first, last = part_of(R * S * STEPS, SPLITS, split)
    for i in range(first, last):
        tap = i // STEPS
        row = tap // S * DILATION_H
        column = tap % S * DILATION_W
        c = i % STEPS * BLOCK_K + step
        x_offset = (x_row + (row * width + column) * PIXEL)[:, None] + c[None, :]
        inside = within_reduction(c, CHANNELS, BLOCK_K)
        x_mask = inside[None, :]
        if PADDED:
            ih = top + row
            iw = left + column
            x_mask = x_mask & ((ih >= 0) & (ih < height) & (iw >= 0) & (iw < width))[:, None]
        a = tl.load(x + x_offset, mask=x_mask, other=0.0)
        b = load_weights(weight, w_row + tap * CHANNELS, c, inside, AMD)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
