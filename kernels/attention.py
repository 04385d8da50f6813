"""Attention over short sequences (up to 1024 tokens), read from the qkv projection's output where it lies.

    y[b, n, h] = softmax_m(q[b, n, h] . k[b, m, h] * scale) v[b, m, h]

The qkv projection writes [B, N, 3, H, D], and the output projection reads [B, N, H * D]: this kernel takes the one and
gives the other, so that nothing is transposed or copied between the three launches.

A program owns BLOCK_M queries of one head and walks the keys in steps, with the running maximum and sum of the softmax
(Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135): the N x N scores exist only as
tiles in registers. Exponentials are of base 2, which is what the hardware has: the scale takes in log2(e).
"""

# ruff: noqa: RUF005  Triton compiles no starred expressions, so tuples are concatenated.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from depthfuse.kernels.device.patches import join_positions
from depthfuse.kernels.launch import (
    Launch,
    Target,
    ceil_div,
    compiler_options,
    needs_wide_offsets,
    next_power_of_2,
    require_rows,
    target_of,
)
from depthfuse.kernels.tuning.lookup import tuned

MAX_TOKENS = 1024
HEAD_DIMS = (32, 128)  # least and most
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionConfig:
    """One program of attention.

    Attributes:
        block_m: queries a program; each program reads all keys and values of its head.
        block_n: keys a step, as wide as the scores' registers allow.
        num_warps: one for each 16 queries, so that a warp holds whole rows of scores and the softmax needs no exchange
            between warps.
        num_stages: key and value tiles in flight.
        interleave: keys whose values one thread gathers before they go to LDS. Values lie with the head dimension
            innermost, but are multiplied along the keys: on AMD, unless a thread holds a few keys of one dimension, LDS
            gives them back 16 bits at a time. NVIDIA transposes while it reads, and needs none (1).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    interleave: int = 1

    def options(self, target: Target) -> dict:
        """Compiler options on `target`."""
        return compiler_options(target, self.num_warps, self.num_stages, nonkdim=16, kpack=2)


@triton.jit(do_not_specialize=["tokens"])
def attention_kernel(
    qkv,  # [B, N, 3, HEADS, HEAD_DIM]
    y,  # [B, N, HEADS, HEAD_DIM]
    scale,  # float, log2(e) included
    tokens,  # N
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERLEAVE: tl.constexpr,
):
    batch = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    if WIDE:
        batch = batch.to(tl.int64)
    ROW: tl.constexpr = 3 * HEADS * HEAD_DIM
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    d_mask = (d < HEAD_DIM)[None, :]
    base = qkv + batch * tokens * ROW + head * HEAD_DIM
    keys = base + HEADS * HEAD_DIM
    values = base + 2 * HEADS * HEAD_DIM

    # Queries past the end compute a copy of the last one, which is never stored.
    source = tl.minimum(query, tokens - 1) * ROW
    q = tl.load(base + source[:, None] + d[None, :], mask=d_mask, other=0.0)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        offset = (key * ROW)[:, None] + d[None, :]
        mask = (key < tokens)[:, None] & d_mask
        k = tl.load(keys + offset, mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        scores = tl.where((key < tokens)[None, :], scores, float("-inf"))
        # The first step holds key 0, so the maximum is finite from there on.
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(weights, axis=1)
        if INTERLEAVE == 1:
            v = tl.load(values + offset, mask=mask, other=0.0)
        else:
            rows = ()
            for i in tl.static_range(INTERLEAVE):
                row = start + tl.arange(0, BLOCK_N // INTERLEAVE) * INTERLEAVE + i
                v_mask = (row < tokens)[:, None] & d_mask
                rows = rows + (tl.load(values + (row * ROW)[:, None] + d[None, :], mask=v_mask, other=0.0),)
            v = tl.permute(join_positions(rows, INTERLEAVE), (0, 2, 1)).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        highest = new_highest

    out = y + batch * tokens * (HEADS * HEAD_DIM) + head * HEAD_DIM
    offset = (query * (HEADS * HEAD_DIM))[:, None] + d[None, :]
    result = acc * (1.0 / total)[:, None]  # one division a row
    tl.store(out + offset, result.to(y.dtype.element_ty), mask=(query < tokens)[:, None] & d_mask)


def config_for(head_dim: int, dtype: torch.dtype, target: Target) -> AttentionConfig:
    """The tile for heads of `head_dim`: the largest that leaves room for two waves on every target."""
    if target.backend == "interpreter":
        return AttentionConfig(64, 64, 4, 1, interleave=4)
    if dtype is torch.float32:
        return AttentionConfig(32, 32, 4, 1)
    if target.backend == "hip":
        if head_dim > 64:
            return AttentionConfig(128, 64, 8, 1, interleave=4)
        return AttentionConfig(64, 32, 4, 1, interleave=4)
    return AttentionConfig(64, 64, 4, 2)


def supports(tokens: int, head_dim: int) -> bool:
    """Whether the kernel takes sequences and heads of this size."""
    return tokens <= MAX_TOKENS and HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]


def plan(
    qkv: torch.Tensor,  # [B, N, 3 * heads * D] contiguous
    y: torch.Tensor,  # [B, N, heads * D] contiguous
    *,
    heads: int,
    scale: float,
    config: AttentionConfig | None,
    target: Target,
) -> Launch:
    """The launch that computes `y`."""
    batch, tokens, width = y.shape
    head_dim = width // heads
    shape = {"sequences": batch * heads, "tokens": tokens, "head_dim": head_dim}
    config = config or tuned("attention", config_for(head_dim, qkv.dtype, target), qkv, target, **shape)
    arguments = {
        "qkv": qkv,
        "y": y,
        "scale": scale * LOG2_E,
        "tokens": tokens,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "WIDE": needs_wide_offsets(qkv),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": next_power_of_2(head_dim),
        "INTERLEAVE": config.interleave,
    }
    grid = (batch * heads, ceil_div(tokens, config.block_m))  # the second axis ends at 65,535
    return Launch(attention_kernel, grid, arguments, config.options(target))


def attention(
    qkv: torch.Tensor,  # [B, N, 3 * heads * D] contiguous: queries, keys, values, each heads x D
    *,
    heads: int,
    scale: float | None = None,
    config: AttentionConfig | None = None,
) -> torch.Tensor:  # [B, N, heads * D]
    """softmax(q k^T scale) v for every head, without mask or dropout; `scale` None is 1 / sqrt(D).

    float16, bfloat16 or float32 in and out; scores and sums are float32, the softmax's weights the dtype of `qkv`.
    That the arguments fit each other, and `supports`, is for the caller to check, as `depthfuse.ops.attention` does.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    target = target_of(qkv)
    require_rows(qkv=qkv)
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    y = torch.empty((batch, tokens, width), dtype=qkv.dtype, device=qkv.device)
    scale = (width // heads) ** -0.5 if scale is None else scale
    plan(qkv, y, heads=heads, scale=scale, config=config, target=target).run(qkv)
    return y
