"""Dense and grouped 2-d convolution with a fused tail.

    y[n, k, p, q] = scale[k] * act(sum_{c,r,s} x[n, c, p*sh - ph + r*dh, q*sw - pw + s*dw] * w[k, c, r, s]
                                   + bias[k] + residual[n, k, p, q]) + shift[k]

It is a matrix product that never writes its left operand down (implicit GEMM): rows are output pixels (n, p, q),
columns are output channels, and the reduction runs over (r, s, c). Everything is channels_last, so that

* the pixel's channels and the weight's (r, s, c) are both contiguous along the reduction: loads are 16 bytes wide, and
  on AMD the operands come out of LDS with 128-bit reads (weights stored [R, S, C, K] would need 16-bit ones);
* the output tile is contiguous along channels.

With many channels the reduction walks tap by tap, and one tap is one row of pixels against one slice of channels.
With few channels (the stem has 3) a tap would leave most of the step empty: there it walks the flat (r, s, c) axis.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from depthfuse.kernels import linear
from depthfuse.kernels.arguments import NO_TAIL, POINTWISE, Tail, Window
from depthfuse.kernels.device.epilogue import write_tile
from depthfuse.kernels.device.implicit_gemm import flat_product, tap_product
from depthfuse.kernels.device.splitk import split_arguments, sum_of_parts
from depthfuse.kernels.device.tile import GemmConfig, gemm_config, tile_of
from depthfuse.kernels.launch import (
    REORDERED,
    Launch,
    Target,
    ceil_div,
    empty_image,
    needs_wide_offsets,
    require_channels_last,
    require_tail,
    target_of,
)
from depthfuse.kernels.tuning.lookup import tuned


# Image sizes and batch change nothing in the code: one compilation serves them all.
@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv2d_kernel(
    x,  # [N, H, W, GROUPS * CHANNELS], or with PLANES [N, GROUPS * CHANNELS, H, W]
    weight,  # [GROUPS * OUT_CHANNELS, R, S, CHANNELS], filters W_STRIDE apart
    bias,  # [GROUPS * OUT_CHANNELS] or None
    residual,  # like y, or None
    scale,  # [GROUPS * OUT_CHANNELS] or None
    shift,  # [GROUPS * OUT_CHANNELS] or None
    y,  # [N, P, Q, GROUPS * OUT_CHANNELS]
    parts,  # see sum_of_parts; None where there is one part
    counters,  # likewise
    pixels,  # N * P * Q
    height,  # H
    width,  # W
    out_height,  # P
    out_width,  # Q
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,  # input channels of one group
    OUT_CHANNELS: tl.constexpr,  # output channels of one group
    R: tl.constexpr,
    S: tl.constexpr,
    W_STRIDE: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    FLAT: tl.constexpr,  # walk the reduction as one axis, not tap by tap
    PLANES: tl.constexpr,  # x lies channel by channel; only with FLAT
    INTERLEAVE: tl.constexpr,  # neighbours of a flat step that a thread loads one by one
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    AMD: tl.constexpr,
):
    split = tl.program_id(2)
    group = tl.program_id(1)
    tile_m, tile_n = tile_of(
        tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.cdiv(OUT_CHANNELS, BLOCK_N), GROUP_M
    )
    if WIDE:
        tile_m = tile_m.to(tl.int64)

    pixel = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end compute a copy of the last one, which is never stored: no mask in the main loop.
    source_pixel = tl.minimum(pixel, pixels - 1)
    source_channel = tl.minimum(channel, OUT_CHANNELS - 1)
    image = source_pixel // (out_height * out_width)
    within = source_pixel % (out_height * out_width)
    top = (within // out_width) * STRIDE_H - PADDING_H
    left = (within % out_width) * STRIDE_W - PADDING_W
    if PLANES:
        x_row = ((image * GROUPS + group) * CHANNELS * height + top) * width + left
    else:
        x_row = ((image * height + top) * width + left) * (GROUPS * CHANNELS) + group * CHANNELS
    w_row = (group * OUT_CHANNELS + source_channel) * W_STRIDE

    PIXEL: tl.constexpr = 1 if PLANES else GROUPS * CHANNELS
    PADDED: tl.constexpr = PADDING_H > 0 or PADDING_W > 0
    if FLAT:
        acc = flat_product(
            x,
            weight,
            x_row,
            w_row,
            top,
            left,
            height,
            width,
            height * width,
            split,
            PIXEL,
            CHANNELS,
            R,
            S,
            W_STRIDE,
            DILATION_H,
            DILATION_W,
            PADDED,
            PLANES,
            INTERLEAVE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SPLITS,
            AMD,
        )
    else:
        acc = tap_product(
            x,
            weight,
            x_row,
            w_row,
            top,
            left,
            height,
            width,
            split,
            PIXEL,
            CHANNELS,
            R,
            S,
            DILATION_H,
            DILATION_W,
            PADDED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SPLITS,
            AMD,
        )

    if SPLITS > 1:
        tile = group * tl.num_programs(0) + tl.program_id(0)
        last, acc = sum_of_parts(acc, parts, counters, tile, split, SPLITS, BLOCK_M, BLOCK_N, AMD)
        if not last:
            return
    first, last = group * OUT_CHANNELS, (group + 1) * OUT_CHANNELS
    write_tile(
        acc,
        bias,
        residual,
        scale,
        shift,
        y,
        pixel,
        pixel < pixels,
        first + tile_n * BLOCK_N,
        last,
        GROUPS * OUT_CHANNELS,
        ACTIVATION,
        BLOCK_M,
        BLOCK_N,
    )


def config_for(
    pixels: int, channels: int, out_channels: int, taps: int, groups: int, dtype: torch.dtype, target: Target
) -> GemmConfig:
    """The tile for `pixels` = N * P * Q output pixels; `channels` and `out_channels` are those of one group."""
    if target.backend == "hip" and channels < FLAT_BELOW and taps * channels % 8:
        # The stem: its pixels are loaded element by element, and only the 16 x 16 matrix instruction then reads its
        # operands from LDS in more than 16 bits at a time.
        block_n, num_warps = (32, 4) if out_channels <= 32 else (64, 8)
        if (
            target.arch == "gfx908" and dtype.itemsize == 2
        ):  # as simulated: benchmarks/results/gfx908_gains.md
            num_warps = 4
        return GemmConfig(128, block_n, 32, num_warps=num_warps, nonkdim=16, kpack=2, overlap=REORDERED)
    if channels >= FLAT_BELOW:
        return gemm_config(pixels, out_channels, channels, groups, dtype, target, taps)
    config = gemm_config(pixels, out_channels, taps * channels, groups, dtype, target)
    if target.arch == "gfx908" and dtype.itemsize == 2:  # likewise
        block_n = 32 if out_channels <= 32 else 64 if out_channels <= 64 else 128
        return replace(config, block_m=64, block_n=block_n, block_k=32, num_warps=4, nonkdim=16)
    if target.backend == "hip":
        # As above, with 64 a step they leave room for one wave only; and fewer rows come out of LDS 16 bits at a time.
        rows = {} if config.block_m >= 64 else {"block_m": 64, "num_warps": 4}
        return replace(config, block_k=32, nonkdim=16, **rows)
    if target.backend == "cuda" and config.block_m * config.block_n >= 128 * 64:
        # Every element of a flat step has an address of its own: on 4 warps they do not fit the registers.
        return replace(config, num_warps=8)
    return config


# Below this many channels a tap-by-tap step of 32 would be more than half empty.
FLAT_BELOW = 32


def is_readable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel reads x [N, C, H, W] as it lies: channels_last; contiguous too, as images come, where it loads
    their few channels one by one in any case.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    return x.is_contiguous() and weight.shape[1] < FLAT_BELOW and weight.shape[2:] != (1, 1)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """The same [K, C, R, S] weight in channels_last, its filters a multiple of 8 elements apart, zeros between them.

    A stem's 7 x 7 x 3 filters would start at odd addresses and be loaded element by element. Other weights are dense
    already. The kernel takes either storage and only runs faster with this one, so prepare weights once.
    """
    k, channels, r, s = weight.shape
    length = r * s * channels
    if channels >= FLAT_BELOW or length % 8 == 0:
        return weight.contiguous(memory_format=torch.channels_last)
    rows = weight.new_zeros(k, ceil_div(length, 8) * 8)
    rows[:, :length] = weight.permute(0, 2, 3, 1).reshape(k, length)
    return rows.as_strided((k, channels, r, s), _packed_strides(weight, rows.shape[1]))


def is_packed(weight: torch.Tensor) -> bool:
    """Whether [K, C, R, S] is stored as the kernel takes it: channels_last, or from `pack_weight`."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return True
    padded = ceil_div(weight[0].numel(), 8) * 8
    return weight.shape[1] < FLAT_BELOW and weight.stride() == _packed_strides(weight, padded)


def _packed_strides(weight: torch.Tensor, filter_stride: int) -> tuple[int, int, int, int]:
    _, channels, _, s = weight.shape
    return filter_stride, 1, s * channels, channels


def _filter_stride(weight: torch.Tensor) -> int:
    # Where there is one filter, PyTorch's stride for it may be anything.
    return weight.stride(0) if weight.shape[0] > 1 else weight[0].numel()


def plan(
    x: torch.Tensor,  # [N, C, H, W], see is_readable
    weight: torch.Tensor,  # [K, C / groups, R, S] channels_last, or from pack_weight
    tail: Tail,  # residual [N, K, P, Q] channels_last
    y: torch.Tensor,  # [N, K, P, Q] channels_last
    window: Window,
    *,
    config: GemmConfig | None,
    target: Target,
) -> Launch:
    """The launch that computes `y`.

    A 1x1 convolution of stride 1 is planned as `linear` over the pixels.
    """
    _, channels, height, width = x.shape
    batch, out_channels, out_height, out_width = y.shape
    _, group_channels, r, s = weight.shape
    groups = window.groups
    if (r, s) == (1, 1) and window == Window(dilation=window.dilation):
        x, residual, y = (
            None if t is None else t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])
            for t in (x, tail.residual, y)
        )
        weight = weight.reshape(out_channels, channels)
        tail = tail._replace(residual=residual)
        return linear.plan(x, weight, tail, y, norm_eps=None, config=config, target=target)
    pixels = batch * out_height * out_width
    group_outputs = out_channels // groups
    shape = {"pixels": pixels, "channels": group_channels, "out_channels": group_outputs, "taps": r * s}
    if config is None:
        usual = config_for(pixels, group_channels, group_outputs, r * s, groups, x.dtype, target)
        config = tuned("conv2d", usual, x, target, **shape, groups=groups)
    grid = (ceil_div(pixels, config.block_m) * ceil_div(group_outputs, config.block_n), groups, config.splits)
    arguments = {
        "x": x,
        "weight": weight,
        **tail.tensors(),
        "y": y,
        **split_arguments(grid[0] * groups, config, target, y.device),
        "pixels": pixels,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        "GROUPS": groups,
        "CHANNELS": group_channels,
        "OUT_CHANNELS": group_outputs,
        "R": r,
        "S": s,
        "W_STRIDE": _filter_stride(weight),
        **window.constants(),
        "ACTIVATION": tail.act,
        "WIDE": needs_wide_offsets(x, weight, y),
        "FLAT": group_channels < FLAT_BELOW,
        "PLANES": not x.is_contiguous(memory_format=torch.channels_last),
        "INTERLEAVE": 4 if target.backend != "cuda" and group_channels % 4 else 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    return Launch(conv2d_kernel, grid, arguments, config.options(target))


def conv2d(
    x: torch.Tensor,  # [N, C, H, W], see is_readable
    weight: torch.Tensor,  # [K, C / groups, R, S] channels_last, or from pack_weight
    tail: Tail = NO_TAIL,  # residual [N, K, P, Q] channels_last
    window: Window = POINTWISE,
    *,
    config: GemmConfig | None = None,
) -> torch.Tensor:  # [N, K, P, Q] channels_last
    """Convolution with its tail in one pass; see this file's head for the formula.

    float16, bfloat16 or float32 in and out, float32 accumulation (true float32 products for float32 inputs).
    `config` None takes `config_for`'s choice. That the arguments fit each other is for the caller to check, as
    `depthfuse.ops.conv2d` does.

    Raises:
        ValueError: a layout other than the above.
    """
    target = target_of(x)
    require_channels_last(
        x=None if is_readable(x, weight) else x, weight=None if is_packed(weight) else weight
    )
    require_tail(tail, require_channels_last)
    size = window.output_size(x.shape[2:], weight.shape[2:])
    y = empty_image((x.shape[0], weight.shape[0], *size), x)
    plan(x, weight, tail, y, window, config=config, target=target).run(x)
    return y
