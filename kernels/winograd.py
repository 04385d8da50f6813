"""Dense 3x3 convolution of stride 1 by Winograd's minimal filtering F(2x2, 3x3), with a fused tail.

    y = scale * act(A^T [ sum_c (G w G^T) * (B^T d B) ] A + bias + residual) + shift

(Lavin and Gray 2016, arXiv 1509.09308). A tile of 2 x 2 outputs is computed from a tile d of 4 x 4 inputs by 16
products a channel pair instead of 36: 2.25 times fewer. The 16 positions of the transformed tile never mix until the
output transform, so each is a matrix product of its own, [tiles, C] by [C, K].

A program owns BLOCK_T tiles and BLOCK_N output channels. For BLOCK_C channels at a time it loads the 16 inputs of its
tiles, transforms them in registers (additions only), and adds 16 products to 16 accumulators. These fill half of
the registers, so a program's tile of outputs is smaller than that of the direct kernel, and reads more from L2 for each
product: it pays where products and not loads are the limit, many channels on both sides. Never taken by itself: it is
one more candidate for a measurement to choose.

The transformed weights, 16/9 as many, are made once (`pack_weight`). The input transform is rounded to the operands'
dtype before the products, and its entries are sums of four inputs, so 16-bit results err by a few times more than
those of the direct kernel. F(4x4, 3x3) would save more products, and lose two digits: not built.
"""
# ruff: noqa: RUF005  Triton compiles no starred expressions, so tuples are concatenated.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from depthfuse.kernels.arguments import NO_TAIL, Tail, Window
from depthfuse.kernels.device.epilogue import finish
from depthfuse.kernels.device.tile import has_warp_groups, tile_of
from depthfuse.kernels.launch import (
    Launch,
    Target,
    ceil_div,
    compiler_options,
    empty_image,
    needs_wide_offsets,
    require_channels_last,
    require_rows,
    require_tail,
    target_of,
)
from depthfuse.kernels.tuning.lookup import tuned

SAME = Window(padding=(1, 1))


@dataclass(frozen=True)
class WinogradConfig:
    """One program of a Winograd convolution.

    Attributes:
        block_t: tiles of 2 x 2 outputs, the rows of the 16 products.
        block_n: output channels. Both are small, because there are 16 accumulators of this size.
        block_c: channels a step; all 16 transformed inputs of a step are in registers at once.
        num_warps: as many as keep the accumulators within half of the registers.
        group_t: tile rows that run side by side over the same weights, so that those stay in L2.
    """

    block_t: int
    block_n: int
    block_c: int
    num_warps: int
    group_t: int = 8

    def options(self, target: Target) -> dict:
        """Compiler options on `target`. One stage: the left operands are computed, not loaded."""
        return compiler_options(target, self.num_warps, 1, nonkdim=16, kpack=2)


@triton.jit
def transform_input(d):
    """B^T d B of a 4 x 4 tile, rows first; `d` and the result are tuples of 16 tensors."""
    rows = ()
    for j in tl.static_range(4):
        rows = rows + (d[j] - d[8 + j],)
    for j in tl.static_range(4):
        rows = rows + (d[4 + j] + d[8 + j],)
    for j in tl.static_range(4):
        rows = rows + (d[8 + j] - d[4 + j],)
    for j in tl.static_range(4):
        rows = rows + (d[4 + j] - d[12 + j],)
    both = ()
    for i in tl.static_range(4):
        a, b, c, e = rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]
        both = both + (a - c, b + c, c - b, b - e)
    return both


@triton.jit
def transform_output(m):
    """A^T m A of a 4 x 4 tuple: the 2 x 2 outputs."""
    rows = ()
    for j in tl.static_range(4):
        rows = rows + (m[j] + m[4 + j] + m[8 + j],)
    for j in tl.static_range(4):
        rows = rows + (m[4 + j] - m[8 + j] - m[12 + j],)
    out = ()
    for i in tl.static_range(2):
        a, b, c, e = rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]
        out = out + (a + b + c, b - c - e)
    return out


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def winograd_kernel(
    x,  # [N, H, W, CHANNELS]
    weight,  # [16, OUT_CHANNELS, CHANNELS], transformed
    bias,  # [OUT_CHANNELS] or None
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
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    tiles_h = tl.cdiv(out_height, 2)
    tiles_w = tl.cdiv(out_width, 2)
    tiles = batch * tiles_h * tiles_w
    block_t, block_n = tile_of(
        tl.program_id(0), tl.cdiv(tiles, BLOCK_T), tl.cdiv(OUT_CHANNELS, BLOCK_N), GROUP_T
    )
    tile = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    image = tile // (tiles_h * tiles_w)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if WIDE:
        image = image.to(tl.int64)
        n = n.to(tl.int64)
    top = tile // tiles_w % tiles_h * 2  # first output row of the tile
    left = tile % tiles_w * 2
    exists = image < batch
    in_top = top - PADDING_H
    in_left = left - PADDING_W
    x_base = ((image * height + in_top) * width + in_left) * CHANNELS
    n_mask = n < OUT_CHANNELS
    # Output channels past the end compute a copy of the last one, which is never stored.
    w_row = tl.minimum(n, OUT_CHANNELS - 1) * CHANNELS

    sums = (tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32),) * 16
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_mask = c < CHANNELS
        d = ()
        for i in tl.static_range(4):
            x_row = x + (x_base + i * width * CHANNELS)[:, None] + c[None, :]
            for j in tl.static_range(4):
                ih = in_top + i
                iw = in_left + j
                inside = exists & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
                value = tl.load(x_row + j * CHANNELS, mask=inside[:, None] & c_mask[None, :], other=0.0)
                d = d + (value.to(tl.float32),)
        v = transform_input(d)
        added = ()
        w_rows = weight + w_row[:, None] + c[None, :]
        for position in tl.static_range(16):
            # The position's offset is a constant behind one pointer: it goes into the instruction, not into registers.
            w = tl.load(w_rows + position * OUT_CHANNELS * CHANNELS, mask=c_mask[None, :], other=0.0)
            left_operand = v[position].to(x.dtype.element_ty)
            added = added + (tl.dot(left_operand, w.T, sums[position], input_precision="ieee"),)
        sums = added

    out = transform_output(sums)
    y_base = ((image * out_height + top) * out_width + left) * OUT_CHANNELS
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            offset = (y_base + (i * out_width + j) * OUT_CHANNELS)[:, None] + n[None, :]
            mask = (exists & (top + i < out_height) & (left + j < out_width))[:, None] & n_mask[None, :]
            result = finish(out[2 * i + j], bias, residual, scale, shift, n, n_mask, offset, mask, ACTIVATION)
            tl.store(y + offset, result.to(y.dtype.element_ty), mask=mask)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """G w G^T for every pair of channels: [K, C, 3, 3] -> [16, K, C], computed in float64 and rounded once."""
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [K, C, 3, 3]")
    g = torch.tensor(
        [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64, device=weight.device
    )
    transformed = torch.einsum("ir,kcrs,js->ijkc", g, weight.double(), g)
    return transformed.flatten(0, 1).to(weight.dtype).contiguous()


def config_for(dtype: torch.dtype, target: Target) -> WinogradConfig:
    """The largest tile that is free of spills."""
    if target.backend == "interpreter":
        return WinogradConfig(32, 32, 32, 4)
    if target.backend == "hip":
        return WinogradConfig(32, 64, 32 if dtype.itemsize == 2 else 16, 8)
    # NVIDIA's threads have half the registers of AMD's; Hopper's warp group instruction takes 64 rows.
    return WinogradConfig(64, 16, 16, 8) if has_warp_groups(target) else WinogradConfig(16, 64, 16, 8)


def supports(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], groups: int
) -> bool:
    """Whether the kernel takes a convolution of this geometry."""
    return (tuple(kernel), tuple(stride), tuple(dilation), groups) == ((3, 3), (1, 1), (1, 1), 1)


def plan(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weight: torch.Tensor,  # [16, K, C] from pack_weight
    tail: Tail,  # residual [N, K, P, Q] channels_last
    y: torch.Tensor,  # [N, K, P, Q] channels_last
    window: Window,  # of which only the padding is free
    *,
    config: WinogradConfig | None,
    target: Target,
) -> Launch:
    """The launch that computes `y`."""
    _, channels, height, width = x.shape
    batch, out_channels, out_height, out_width = y.shape
    shape = {"pixels": batch * out_height * out_width, "channels": channels, "out_channels": out_channels}
    config = config or tuned("winograd_conv2d", config_for(x.dtype, target), x, target, **shape)
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
        "OUT_CHANNELS": out_channels,
        "PADDING_H": window.padding[0],
        "PADDING_W": window.padding[1],
        "ACTIVATION": tail.act,
        "WIDE": needs_wide_offsets(x, weight, y),
        "BLOCK_T": config.block_t,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "GROUP_T": config.group_t,
    }
    tiles = batch * ceil_div(out_height, 2) * ceil_div(out_width, 2)
    grid = (ceil_div(tiles, config.block_t) * ceil_div(out_channels, config.block_n),)
    return Launch(winograd_kernel, grid, arguments, config.options(target))


def winograd_conv2d(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weight: torch.Tensor,  # [16, K, C] from pack_weight
    tail: Tail = NO_TAIL,  # residual [N, K, P, Q] channels_last
    window: Window = SAME,  # of which only the padding is free
    *,
    config: WinogradConfig | None = None,
) -> torch.Tensor:  # [N, K, P, Q] channels_last
    """Dense 3x3 convolution of stride 1 with its tail; this file's head has the formula.

    float16, bfloat16 or float32 in and out, float32 accumulation. `config` None takes `config_for`'s choice. That the
    arguments fit each other is for the caller to check, as `depthfuse.ops.winograd_conv2d` does.

    Raises:
        ValueError: a layout other than the above.
    """
    target = target_of(x)
    require_channels_last(x=x)
    require_rows(weight=weight)
    require_tail(tail, require_channels_last)
    y = empty_image((x.shape[0], weight.shape[1], *window.output_size(x.shape[2:], (3, 3))), x)
    plan(x, weight, tail, y, window, config=config, target=target).run(x)
    return y
