"""Linear layer (and 1x1 convolution) with a fused tail.

    y[m, k] = scale[k] * act(sum_c n(x)[m, c] * w[k, c] + bias[k] + residual[m, k]) + shift[k]

where n(x) is x, or (`norm_eps` given) x normalised over its channels: LayerNorm, whose own scale and shift belong in w
and bias, as W diag(gamma) and b + W beta. The normalised tensor is never written: a first pass over the tile's rows
finds their mean and variance, and the second, which multiplies, finds them in cache.

Both operands are contiguous along the reduction c, as PyTorch stores them: no transposed copy is made, loads are
16 bytes wide, and AMD reads them out of LDS with 128-bit reads. The channel counts are compile-time constants: they let
the compiler prove alignment, and drop the reduction's mask where the step divides it.
"""

import torch
import triton
import triton.language as tl

from depthfuse.kernels.arguments import NO_TAIL, Tail
from depthfuse.kernels.device.epilogue import write_tile
from depthfuse.kernels.device.splitk import part_of, split_arguments, sum_of_parts
from depthfuse.kernels.device.tile import GemmConfig, gemm_config, load_weights, tile_of, within_reduction
from depthfuse.kernels.launch import (
    Launch,
    Target,
    ceil_div,
    needs_wide_offsets,
    require_rows,
    require_tail,
    target_of,
)
from depthfuse.kernels.tuning.lookup import tuned


@triton.jit
def row_statistics(
    x, x_row, CHANNELS: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Mean and 1 / sqrt(variance + EPS) of rows of x, each float32 [BLOCK_M], in one pass.

    Sums are of differences from the row's first element, so that a large common offset does not cancel them away.
    """
    first = tl.load(x + x_row).to(tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        inside = within_reduction(c, CHANNELS, BLOCK_K)[None, :]
        value = tl.load(x + x_row[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - first[:, None], 0.0)
        total += tl.sum(value, axis=1)
        squares += tl.sum(value * value, axis=1)
    offset = total / CHANNELS
    # The difference of two rounded sums may come out below zero where a row is constant.
    variance = tl.maximum(squares / CHANNELS - offset * offset, 0.0)
    return first + offset, tl.rsqrt(variance + EPS)


@triton.jit
def product(
    x,
    weight,
    x_row,  # [BLOCK_M] offsets of rows of x
    w_row,  # [BLOCK_N] offsets of rows of weight
    CHANNELS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    AMD: tl.constexpr,
    split,
):
    """Rows of n(x) times rows of weight, summed over one part of CHANNELS: float32 [BLOCK_M, BLOCK_N]."""
    if NORM_EPS is not None:
        mean, inverse = row_statistics(x, x_row, CHANNELS, NORM_EPS, BLOCK_M, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first, last = part_of((CHANNELS + BLOCK_K - 1) // BLOCK_K, SPLITS, split)
    for step in range(first, last):
        c = step * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = within_reduction(c, CHANNELS, BLOCK_K)
        a = tl.load(x + x_row[:, None] + c[None, :], mask=inside[None, :], other=0.0)
        b = load_weights(weight, w_row, c, inside, AMD)
        if NORM_EPS is not None:
            a = ((a.to(tl.float32) - mean[:, None]) * inverse[:, None]).to(x.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


# Image sizes and batch change nothing in the code: one compilation serves them all.
@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # [rows, CHANNELS], rows X_STRIDE apart
    weight,  # [OUT_CHANNELS, CHANNELS]
    bias,  # [OUT_CHANNELS] or None
    residual,  # like y, or None
    scale,  # [OUT_CHANNELS] or None
    shift,  # [OUT_CHANNELS] or None
    y,  # [rows, OUT_CHANNELS]
    parts,  # see sum_of_parts; None where there is one part
    counters,  # likewise
    rows,
    X_STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    NORM_EPS: tl.constexpr,  # None: no normalisation
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    AMD: tl.constexpr,
):
    split = tl.program_id(1)
    tile_m, tile_n = tile_of(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(OUT_CHANNELS, BLOCK_N), GROUP_M
    )
    if WIDE:
        tile_m = tile_m.to(tl.int64)
        tile_n = tile_n.to(tl.int64)

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end compute a copy of the last one, which is never stored: no mask in the main loop.
    x_row = tl.minimum(row, rows - 1) * X_STRIDE
    w_row = tl.minimum(channel, OUT_CHANNELS - 1) * CHANNELS

    acc = product(x, weight, x_row, w_row, CHANNELS, NORM_EPS, BLOCK_M, BLOCK_N, BLOCK_K, SPLITS, AMD, split)

    if SPLITS > 1:
        tile = tl.program_id(0)
        last, acc = sum_of_parts(acc, parts, counters, tile, split, SPLITS, BLOCK_M, BLOCK_N, AMD)
        if not last:
            return
    write_tile(
        acc,
        bias,
        residual,
        scale,
        shift,
        y,
        row,
        row < rows,
        tile_n * BLOCK_N,
        OUT_CHANNELS,
        OUT_CHANNELS,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
    )


def config_for(rows: int, channels: int, out_channels: int, dtype: torch.dtype, target: Target) -> GemmConfig:
    """The tile for x [rows, channels] and weight [out_channels, channels]."""
    return gemm_config(rows, out_channels, channels, 1, dtype, target)


def plan(
    x: torch.Tensor,  # [rows, C], contiguous along C
    weight: torch.Tensor,  # [K, C] contiguous
    tail: Tail,  # residual [rows, K] contiguous
    y: torch.Tensor,  # [rows, K] contiguous
    *,
    norm_eps: float | None,
    config: GemmConfig | None,
    target: Target,
) -> Launch:
    """The launch that computes `y`."""
    rows, channels = x.shape
    out_channels = weight.shape[0]
    shape = {
        "rows": rows,
        "channels": channels,
        "out_channels": out_channels,
        "norm": int(norm_eps is not None),
    }
    if config is None:
        usual = config_for(rows, channels, out_channels, x.dtype, target)
        config = tuned("linear", usual, x, target, **shape)
    grid = (ceil_div(rows, config.block_m) * ceil_div(out_channels, config.block_n), config.splits)
    arguments = {
        "x": x,
        "weight": weight,
        **tail.tensors(),
        "y": y,
        **split_arguments(grid[0], config, target, y.device),
        "rows": rows,
        "X_STRIDE": x.stride(0),
        "CHANNELS": channels,
        "OUT_CHANNELS": out_channels,
        "NORM_EPS": norm_eps,
        "ACTIVATION": tail.act,
        "WIDE": needs_wide_offsets(x, weight, y),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    return Launch(linear_kernel, grid, arguments, config.options(target))


def linear(
    x: torch.Tensor,  # [..., C]
    weight: torch.Tensor,  # [K, C]
    tail: Tail = NO_TAIL,  # residual [..., K]
    *,
    norm_eps: float | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:  # [..., K]
    """Linear layer, after LayerNorm where `norm_eps` is given, with its tail in one pass; see this file's head.

    float16, bfloat16 or float32 in and out, float32 accumulation (true float32 products for float32 inputs).
    Tensors are contiguous; a two-dimensional `x` may have rows further apart (the class token of a batch).
    `config` None takes `config_for`'s choice. That the arguments fit each other is for the caller to check, as
    `depthfuse.ops.linear` does.

    Raises:
        ValueError: a layout other than the above.
    """
    target = target_of(x)
    strided_rows = x.dim() == 2 and x.stride(1) == 1
    require_rows(x=None if strided_rows else x, weight=weight)
    require_tail(tail, require_rows)
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    x2, residual2, y2 = (
        t if t is None or t.dim() == 2 else t.view(-1, t.shape[-1])  # a view: checked above
        for t in (x, tail.residual, y)
    )
    options = {"norm_eps": norm_eps, "config": config, "target": target}
    plan(x2, weight, tail._replace(residual=residual2), y2, **options).run(x)
    return y
