"""Split-K: cut a product's reduction into parts that run at the same time; the last to arrive adds them up, in order.

At batch 1 a 7 x 7 image has 49 rows: a tile or two for a chip of a hundred compute units, each walking thousands of
channels alone. With the reduction cut into SPLITS parts, SPLITS times as many programs run. Each leaves its float32
sums in a workspace and counts itself in; the one that finds all others of its tile arrived adds the parts up from first
to last, whoever computed them, and goes on to the tail. So the same bits come out at every run, and no second launch is
needed: at batch 1 a launch costs as much as many of these products.

The order of memory that this rests on: every thread's part is in L2 before its program counts itself in, and the last
program reads no older copy. On NVIDIA the barrier and the counter's acquire-release say so (PTX memory model: causality
order through barriers). On AMD a release waits for the stores of its own wave only, so each wave waits for its stores
before the barrier.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from depthfuse.kernels.counters import counters
from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.launch import Target


@triton.jit
def part_of(STEPS: tl.constexpr, SPLITS: tl.constexpr, split):
    """First and last (exclusive) of a part's reduction steps; constants where there is one part."""
    if SPLITS == 1:
        return 0, STEPS
    else:
        LENGTH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
        return split * LENGTH, tl.minimum(split * LENGTH + LENGTH, STEPS)


@triton.jit
def sum_of_parts(
    acc,  # float32 [BLOCK_M, BLOCK_N], this program's part of its tile
    parts,  # float32 [tiles, SPLITS, BLOCK_M, BLOCK_N], written and read here
    counters,  # int32 [tiles], zeros before and after
    tile,
    split,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AMD: tl.constexpr,
):
    """(whether this program arrived last, in that one the sum of the tile's parts)."""
    within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    first = parts + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N)
    tl.store(first + split * (BLOCK_M * BLOCK_N) + within, acc)
    if AMD:
        tl.inline_asm_elementwise("s_waitcnt vmcnt(0)", "=v,0", [split], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i in range(SPLITS):  # unrolled, the parts would all be in registers at once
            acc += tl.load(first + i * (BLOCK_M * BLOCK_N) + within, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return last, acc


def split_arguments(tiles: int, config: GemmConfig, target: Target, device: torch.device) -> dict[str, Any]:
    """The kernel's arguments about its parts, for `tiles` tiles on `device`."""
    parts = zeros = None
    if config.splits > 1:
        shape = (tiles, config.splits, config.block_m, config.block_n)
        parts = torch.empty(shape, dtype=torch.float32, device=device)
        zeros = counters(tiles, device)
    return {"parts": parts, "counters": zeros, "SPLITS": config.splits, "AMD": target.backend == "hip"}
