"""Take a tile of pixels apart into separate tensors, one a position, and put it together again.

Triton cannot index a tensor inside a program: a pixel's neighbour in the same tile is out of reach. But a tile laid out
as [patch, channel, position] can be split along its last axis, in halves of halves, into one tensor per position;
with the positions of a patch in one thread's registers, a neighbour is another tensor of the tuple, and costs nothing.
"""
# ruff: noqa: RUF005  Triton compiles no starred expressions, so tuples are concatenated.

import triton
import triton.language as tl


@triton.jit
def split_positions(tile, POSITIONS: tl.constexpr):
    """[A, B, POSITIONS] -> tuple of POSITIONS tensors [A, B]; POSITIONS is a power of 2, at least 2."""
    A: tl.constexpr = tile.shape[0]
    B: tl.constexpr = tile.shape[1]
    parts = (tile,)
    for level in tl.static_range(10):
        if POSITIONS >> level > 1:
            halves = ()
            for i in tl.static_range(len(parts)):
                pair = tl.reshape(parts[i], (A, B, 2, POSITIONS >> (level + 1)))
                first, second = tl.split(tl.permute(pair, (0, 1, 3, 2)))
                halves = halves + (first, second)
            parts = halves
    flat = ()
    for i in tl.static_range(POSITIONS):
        flat = flat + (tl.reshape(parts[i], (A, B)),)
    return flat


@triton.jit
def join_positions(parts, SLOTS: tl.constexpr):
    """Tuple of at most SLOTS tensors [A, B] -> [A, B, SLOTS], the last one repeated; SLOTS is a power of 2."""
    A: tl.constexpr = parts[0].shape[0]
    B: tl.constexpr = parts[0].shape[1]
    joined = ()
    for i in tl.static_range(SLOTS):
        joined = joined + (tl.expand_dims(parts[min(i, len(parts) - 1)], 2),)
    for level in tl.static_range(10):
        if SLOTS >> level > 1:
            pairs = ()
            for i in tl.static_range(len(joined) // 2):
                pair = tl.permute(tl.join(joined[2 * i], joined[2 * i + 1]), (0, 1, 3, 2))
                pairs = pairs + (tl.reshape(pair, (A, B, 2 << level)),)
            joined = pairs
    return joined[0]
