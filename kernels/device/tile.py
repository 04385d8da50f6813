"""Tile sizes for the kernels that are matrix products: linear, 1x1 and k x k convolution.

y [M, N] = a [M, K] b [K, N], cut into BLOCK_M x BLOCK_N tiles, one program each, which walk K in steps of BLOCK_K.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from depthfuse.kernels.device import gfx908
from depthfuse.kernels.launch import IN_FLIGHT, REORDERED, Target, ceil_div, compiler_options


@dataclass(frozen=True)
class GemmConfig:
    """One tile of a matrix product.

    Attributes:
        block_m: output rows (pixels, tokens). Large tiles reuse each loaded weight more often; small ones fill the
            chip when there are few rows.
        block_n: output channels, likewise. No wider than the channel count, as the rest is waste.
        block_k: reduction step. 32 or 64 elements: whole cache lines, and a multiple of every matrix instruction's
            depth; more costs shared memory and with it occupancy.
        group_m: row tiles that run side by side over the same weights, so that those weights stay in L2.
        num_warps: a 128 x 128 accumulator needs 8 warps: with 4, its registers leave room for one wave only (AMD)
            or spill (NVIDIA).
        num_stages: loads in flight ahead of the product.
        splits: parts that the reduction is cut into (splitk.py), where tiles alone would leave the chip idle.
        nonkdim: AMD: rows and columns of the matrix instruction. 32 does more work per operand read, 16 fits
            small tiles.
        kpack: AMD: 2 packs two k-steps per shared memory read, which makes it 128 bits wide for 16-bit types.
        overlap: gfx908: what the compiler may overlap, see `compiler_options`.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 2
    splits: int = 1
    nonkdim: int = 0
    kpack: int = 1
    overlap: int = IN_FLIGHT

    def options(self, target: Target) -> dict:
        """Compiler options of this tile on `target`."""
        return compiler_options(
            target, self.num_warps, self.num_stages, self.nonkdim, self.kpack, self.overlap
        )


# (block_m, block_n, widest block_k, num_warps), all free of spills for every target (benchmarks/results/prove_*.csv).
_HIP_TILES = (
    (128, 128, 32, 8),
    (128, 64, 32, 4),
    (64, 128, 32, 4),
    (128, 32, 64, 4),
    (64, 64, 64, 4),
    (64, 32, 64, 2),
    (32, 64, 64, 2),
    (32, 32, 64, 1),
)
# A 64 x 32 tile on 4 warps spills: the compiler aims at more programs than the registers hold.
_SM80_TILES = (
    (128, 128, 64, 8),
    (128, 64, 64, 4),
    (64, 128, 64, 4),
    (64, 64, 64, 4),
    (64, 32, 64, 2),
    (32, 64, 64, 2),
    (32, 32, 64, 2),
)
# Hopper's warp group instruction takes 64 rows and 4 warps; the widest tile's accumulator takes half of all registers.
_SM90_TILES = (
    (128, 256, 64, 8),
    (128, 128, 64, 8),
    (128, 64, 64, 4),
    (64, 128, 64, 4),
    (64, 64, 64, 4),
    (64, 32, 64, 4),
    (32, 64, 64, 4),
    (32, 32, 64, 2),
)
# float32 on NVIDIA is plain FMA: the accumulator and both operands live in registers, so tiles stay small.
_CUDA_FMA_TILES = ((64, 64, 16, 8), (64, 32, 16, 4), (32, 32, 16, 2))

_LOAD_BYTES_PER_CLOCK = 64  # L2 to one compute unit, both vendors, to within a factor of two
_STEP_CLOCKS = 200  # below this a step is bound by latency, not by its products or loads
_TILE_CLOCKS = 1500  # index arithmetic, first loads, tail
_ARRIVAL_CLOCKS = 1500  # a part's stores to L2, its counter, the last one's first loads, one after another
_SPLITS = (1, 2, 4, 8)
_MOST_STAGES = 3  # of a pipeline on NVIDIA


def _macs_per_clock(dtype: torch.dtype, target: Target) -> int:
    """Matrix throughput of one compute unit, in multiply-adds."""
    if target.backend == "cuda":
        # Data centres' cards by generation; all others' tensor cores are an eighth of Hopper's.
        full = {(8, 0): 1024, (9, 0): 2048, (10, 0): 4096, (10, 3): 4096}.get(target.capability, 256)
        return full if dtype is not torch.float32 else 128
    full = 1024 if target.arch == "gfx942" else 512
    if dtype is torch.float32:
        return full // 4
    return full // 2 if dtype is torch.bfloat16 and target.arch == "gfx908" else full


def _tiles(dtype: torch.dtype, target: Target) -> tuple[tuple[int, int, int, int], ...]:
    if target.backend == "hip":
        return _HIP_TILES
    if dtype is torch.float32:
        return _CUDA_FMA_TILES
    return tuple(
        tile
        for tile in (_SM90_TILES if has_warp_groups(target) else _SM80_TILES)
        if (tile[0] + tile[1]) * tile[2] * dtype.itemsize * _MOST_STAGES <= target.shared_bytes
    )


def has_warp_groups(target: Target) -> bool:
    """Whether four warps multiply together: Hopper and the data centre's Blackwell do, the desktop's does not."""
    return target.backend == "cuda" and (9, 0) <= target.capability < (12, 0)


@functools.cache
def gemm_config(
    m: int, n: int, k: int, groups: int, dtype: torch.dtype, target: Target, taps: int = 1
) -> GemmConfig:
    """The tile that a small model of one compute unit expects to finish first.

    Time = rounds of tiles over the compute units x time of a tile; the latter is bound by products, loads or latency.
    It trades the large tile's reuse against the rounds that a small grid leaves half empty. On the MI100 products of
    16-bit types go by a model of their own, `gfx908.py`.

    Args:
        m, n, k: rows, columns and depth of one group's product.
        groups: products of that size.
        taps: pieces of depth `k` that the reduction is made of; no step crosses from one to the next.
    """
    if target.backend == "interpreter":
        return GemmConfig(64, 32, 64)  # few programs and steps: each costs milliseconds there
    macs = _macs_per_clock(dtype, target)
    # There the accumulators are a register file of their own, and in loops of 16-bit products the compiler copies them
    # for matrix instructions of 16 rows; for those of 32 it does not.
    if target.arch == "gfx908" and dtype.itemsize == 2:
        tile, splits = gfx908.fastest(gfx908.Product(m, n, k, taps, groups, macs, dtype.itemsize))
        sizes = tile.block_m, tile.block_n, tile.block_k
        return GemmConfig(*sizes, 8, tile.num_warps, 2, splits, nonkdim=32, kpack=2, overlap=REORDERED)

    def clocks(choice: tuple[tuple[int, int, int, int], int]) -> float:
        tile, splits = choice
        block_m, block_n, _, _ = tile
        block_k = _block_k(k, tile, dtype)
        rounds = ceil_div(ceil_div(m, block_m) * ceil_div(n, block_n) * groups * splits, target.compute_units)
        steps = ceil_div(taps * ceil_div(k, block_k), splits)
        product = block_m * block_n * block_k / macs
        load = (block_m + block_n) * block_k * dtype.itemsize / _LOAD_BYTES_PER_CLOCK
        time = rounds * (_TILE_CLOCKS + steps * max(product, load, _STEP_CLOCKS))
        if splits == 1:
            return time
        # Each program writes its part, float32; the last one of a tile reads them all.
        moved = 4 * (1 + splits) * block_m * block_n
        return time + _ARRIVAL_CLOCKS + moved / _LOAD_BYTES_PER_CLOCK

    tile, splits = min(itertools.product(_tiles(dtype, target), _SPLITS), key=clocks)
    block_m, block_n, _, num_warps = tile
    block_k = _block_k(k, tile, dtype)
    if target.backend == "hip":
        # In small tiles of float32 on gfx908 matrix instructions of 32 rows leave no registers for a second wave; of
        # other cards' nothing speaks against those of 16.
        nonkdim = 32 if block_m * block_n >= 64 * 64 else 16
        kpack = 2 if dtype.itemsize == 2 else 1
        return GemmConfig(block_m, block_n, block_k, 8, num_warps, 2, splits, nonkdim, kpack, REORDERED)
    # A single step has nothing to load ahead, and its addresses are many.
    num_stages = _MOST_STAGES if dtype.itemsize == 2 and taps * ceil_div(k, block_k) > 1 else 2
    return GemmConfig(block_m, block_n, block_k, 8, num_warps, num_stages, splits)


def _block_k(k: int, tile: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """The tile's widest step, halved while it pads the depth `k`; float32 takes half, for the same bytes."""
    block_k = tile[2] if dtype.itemsize == 2 else min(tile[2], 32)
    return block_k // 2 if block_k == 64 and k % 64 and k % 64 <= 32 else block_k


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a program's tile: column by column within bands of GROUP_M rows, so that L2 serves re-reads."""
    band = program // (GROUP_M * tiles_n)
    first_m = band * GROUP_M
    band_m = tl.minimum(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first_m + within % band_m, within // band_m


@triton.jit
def within_reduction(index, LENGTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """`index` < LENGTH, as a constant where every step is full, so that the compiler drops the mask."""
    if LENGTH % BLOCK_K == 0:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < LENGTH


@triton.jit
def load_weights(weight, column, depth, inside, AMD: tl.constexpr):
    """Weights [BLOCK_K, BLOCK_N] that lie column by column: element (k, n) is at `column[n] + depth[k]`, and zero where
    not `inside[k]`.

    On AMD they are loaded as the product takes them: Triton then knows that a matrix instruction reads them, and lays
    them out in LDS without bank conflicts. NVIDIA transposes as it reads; loaded so, a sixth of the products on sm_80
    leaves room for fewer programs, and a few spill.
    """
    if AMD:
        return tl.load(weight + column[None, :] + depth[:, None], mask=inside[:, None], other=0.0)
    else:
        return tl.load(weight + column[:, None] + depth[None, :], mask=inside[None, :], other=0.0).T
