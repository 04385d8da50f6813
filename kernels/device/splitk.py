"""Split-K: cut a product's reduction into parts that run at the same time, then add the parts up in a fixed order.

At batch 1 a 7 x 7 image has 49 rows: a tile or two for a chip of a hundred compute units, each walking thousands of
channels alone. With the reduction cut into SPLITS parts, SPLITS times as many programs run, each leaving its float32
sums in a workspace [SPLITS, rows, channels]; `reduce` adds them from first to last and applies the fused tail. No
atomics, so the same bits come out at every run.
"""

import torch
import triton
import triton.language as tl

from depthfuse.kernels.arguments import Tail
from depthfuse.kernels.device.epilogue import finish
from depthfuse.kernels.launch import Launch, Target, ceil_div, compiler_options

_BLOCK_ROWS = 4
_BLOCK_CHANNELS = 128


@triton.jit
def part_of(STEPS: tl.constexpr, SPLITS: tl.constexpr, split):
    """First and last (exclusive) of a part's reduction steps; constants where there is one part."""
    if SPLITS == 1:
        return 0, STEPS
    else:
        LENGTH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
        return split * LENGTH, tl.minimum(split * LENGTH + LENGTH, STEPS)


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(
    parts,  # float32 [SPLITS, rows, CHANNELS]
    bias,  # [CHANNELS] or None
    residual,  # like y, or None
    scale,  # [CHANNELS] or None
    shift,  # [CHANNELS] or None
    y,  # [rows, CHANNELS]
    rows,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if WIDE:
        row = row.to(tl.int64)
    channel_mask = channel < CHANNELS
    offset = row[:, None] * CHANNELS + channel[None, :]
    mask = (row < rows)[:, None] & channel_mask[None, :]
    acc = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        part = parts + split * rows.to(tl.int64) * CHANNELS
        acc += tl.load(part + offset, mask=mask, other=0.0)
    acc = finish(acc, bias, residual, scale, shift, channel, channel_mask, offset, mask, ACTIVATION)
    tl.store(y + offset, acc.to(y.dtype.element_ty), mask=mask)


def workspace(splits: int, rows: int, channels: int, device: torch.device) -> torch.Tensor:
    """The float32 [splits, rows, channels] that the parts are written to."""
    return torch.empty((splits, rows, channels), dtype=torch.float32, device=device)


def plan(
    parts: torch.Tensor,  # float32 [splits, rows, K]
    tail: Tail,  # residual [rows, K] contiguous
    y: torch.Tensor,  # [rows, K] contiguous
    *,
    wide: bool,
    target: Target,
) -> Launch:
    """The launch that adds up the parts and applies the tail."""
    splits, rows, channels = parts.shape
    arguments = {
        "parts": parts,
        **tail.tensors(),
        "y": y,
        "rows": rows,
        "CHANNELS": channels,
        "SPLITS": splits,
        "ACTIVATION": tail.act,
        "WIDE": wide,
        "BLOCK_ROWS": _BLOCK_ROWS,
        "BLOCK_CHANNELS": _BLOCK_CHANNELS,
    }
    grid = (ceil_div(rows, _BLOCK_ROWS), ceil_div(channels, _BLOCK_CHANNELS))
    return Launch(reduce_kernel, grid, arguments, compiler_options(target, num_warps=4, num_stages=1))
