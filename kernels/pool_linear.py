"""Global average pool and the classifier behind it.

    m[n, c] = mean over the pixels p of x[n, p, c]
    y[n, k] = sum_c norm(m)[n, c] * w[k, c] + bias[k]

where norm is nothing, or (`norm_eps` given) LayerNorm without its affine, which belongs in w and bias (ConvNeXt).

At batch 1 a classifier is a matrix times a vector, bound by reading the weight once, and its image (49 pixels) is
small: one launch, in which every program pools the image for itself and owns a few classes. Past a few images that
repeated pooling would cost more than a launch: there `pool_kernel` writes the means, and `linear` does the rest.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from depthfuse.kernels import linear
from depthfuse.kernels.arguments import Tail
from depthfuse.kernels.launch import (
    Launch,
    Target,
    ceil_div,
    compiler_options,
    needs_wide_offsets,
    require_channels_last,
    require_rows,
    target_of,
)


@dataclass(frozen=True)
class PoolLinearConfig:
    """How a pool and a classifier run.

    Attributes:
        fused: one launch instead of two.
        block_p: pixels a step of the sum: enough loads in flight to hide memory's latency.
        block_c: channels a step; of the lone pool, a program.
        block_k: classes a program of the fused kernel: few, so that the weight's rows spread over the whole chip.
    """

    fused: bool
    block_p: int = 16
    block_c: int = 128
    block_k: int = 8

    def options(self, target: Target) -> dict:
        """Compiler options on `target`: small programs, nothing to pipeline."""
        return compiler_options(target, num_warps=4, num_stages=1)


@triton.jit
def mean_of_pixels(x, image, channel, channel_mask, pixels, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Means of one image's pixels, float32, shaped like `channel` [BLOCK_C]."""
    total = tl.zeros((BLOCK_P, channel.shape[0]), dtype=tl.float32)
    for start in range(0, pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        offset = pixel[:, None] * CHANNELS + channel[None, :]
        mask = (pixel < pixels)[:, None] & channel_mask[None, :]
        total += tl.load(x + image * pixels * CHANNELS + offset, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0) / pixels


@triton.jit(do_not_specialize=["pixels"])
def pool_kernel(
    x,  # [N, pixels, CHANNELS]
    y,  # [N, CHANNELS]
    pixels,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(0)
    if WIDE:
        image = image.to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < CHANNELS
    mean = mean_of_pixels(x, image, channel, channel_mask, pixels, CHANNELS, BLOCK_P)
    tl.store(y + image * CHANNELS + channel, mean.to(y.dtype.element_ty), mask=channel_mask)


@triton.jit(do_not_specialize=["pixels"])
def pool_linear_kernel(
    x,  # [N, pixels, CHANNELS]
    weight,  # [OUT_CHANNELS, CHANNELS]
    bias,  # [OUT_CHANNELS] or None
    y,  # [N, OUT_CHANNELS]
    pixels,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    NORM_EPS: tl.constexpr,  # None: no normalisation
    WIDE: tl.constexpr,  # 64-bit offsets
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = tl.program_id(0)
    if WIDE:
        image = image.to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = k < OUT_CHANNELS
    # Sums per channel slot, added up across the slots once, at the end. The normalisation comes out of the product:
    # sum_c (m - mean) / deviation * w = (sum_c m w - mean * sum_c w) / deviation, both centred on the first channel's
    # mean, so that a large common offset does not cancel everything away.
    products = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    weights = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    first = 0.0
    if NORM_EPS is not None:
        one = tl.zeros((1,), dtype=tl.int32)
        first = tl.sum(mean_of_pixels(x, image, one, one == 0, pixels, CHANNELS, BLOCK_P), axis=0)
    for start in range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        channel_mask = channel < CHANNELS
        mean = mean_of_pixels(x, image, channel, channel_mask, pixels, CHANNELS, BLOCK_P)
        w_mask = k_mask[:, None] & channel_mask[None, :]
        w = tl.load(weight + k[:, None] * CHANNELS + channel[None, :], mask=w_mask, other=0.0).to(tl.float32)
        if NORM_EPS is not None:
            mean = tl.where(channel_mask, mean - first, 0.0)
            weights += w
            total += mean
            squares += mean * mean
        products += w * mean[None, :]
    result = tl.sum(products, axis=1)
    if NORM_EPS is not None:
        mean = tl.sum(total, axis=0) / CHANNELS
        # The difference of two rounded sums may come out below zero where all means are equal.
        variance = tl.maximum(tl.sum(squares, axis=0) / CHANNELS - mean * mean, 0.0)
        result = (result - mean * tl.sum(weights, axis=1)) * tl.rsqrt(variance + NORM_EPS)
    if bias is not None:
        result += tl.load(bias + k, mask=k_mask, other=0.0).to(tl.float32)
    tl.store(y + image * OUT_CHANNELS + k, result.to(y.dtype.element_ty), mask=k_mask)


_L2_BYTES_PER_MICROSECOND = 2e6  # read by all compute units together, both vendors, to within a factor of two
_LAUNCH_US = 2.0  # of one more kernel in a replayed graph


def config_for(
    images: int, pixels: int, channels: int, out_channels: int, dtype: torch.dtype, target: Target
) -> PoolLinearConfig:
    """One launch where pooling once for each group of classes takes less time than a second launch."""
    groups = ceil_div(out_channels, PoolLinearConfig.block_k)
    repeated_us = images * groups * pixels * channels * dtype.itemsize / _L2_BYTES_PER_MICROSECOND
    # The fused kernel has no matrix product either, so more than a few images would also multiply slowly.
    fused = target.backend == "interpreter" or (images <= 4 and repeated_us < 10 * _LAUNCH_US)
    return PoolLinearConfig(fused)


def plan(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weight: torch.Tensor,  # [K, C] contiguous
    bias: torch.Tensor | None,  # [K]
    y: torch.Tensor,  # [N, K] contiguous
    *,
    norm_eps: float | None,
    config: PoolLinearConfig | None,
    target: Target,
) -> list[Launch]:
    """The launches that compute `y`: one, or the pool and then the linear layer's."""
    images, channels, height, width = x.shape
    out_channels = weight.shape[0]
    config = config or config_for(images, height * width, channels, out_channels, x.dtype, target)
    shared = {
        "x": x,
        "pixels": height * width,
        "CHANNELS": channels,
        "WIDE": needs_wide_offsets(x),
        "BLOCK_P": config.block_p,
        "BLOCK_C": config.block_c,
    }
    if config.fused:
        arguments = shared | {
            "weight": weight,
            "bias": bias,
            "y": y,
            "OUT_CHANNELS": out_channels,
            "NORM_EPS": norm_eps,
            "BLOCK_K": config.block_k,
        }
        grid = (images, ceil_div(out_channels, config.block_k))
        return [Launch(pool_linear_kernel, grid, arguments, config.options(target))]
    means = torch.empty((images, channels), dtype=x.dtype, device=x.device)
    grid = (images, ceil_div(channels, config.block_c))
    pool = Launch(pool_kernel, grid, shared | {"y": means}, config.options(target))
    options = {"norm_eps": norm_eps, "config": None, "target": target}
    return [pool, linear.plan(means, weight, Tail(bias), y, **options)]


def pool_linear(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weight: torch.Tensor,  # [K, C]
    bias: torch.Tensor | None = None,  # [K]
    *,
    norm_eps: float | None = None,
    config: PoolLinearConfig | None = None,
) -> torch.Tensor:  # [N, K]
    """Mean over the pixels, LayerNorm where `norm_eps` is given, linear layer; this file's head has the formula.

    float16, bfloat16 or float32 in and out, float32 sums; in two launches the means are rounded to the dtype of `x`.
    `config` None takes `config_for`'s choice. That the arguments fit each other is for the caller to check, as
    `depthfuse.ops.pool_linear` does.

    Raises:
        ValueError: a layout other than the above.
    """
    target = target_of(x)
    require_channels_last(x=x)
    require_rows(weight=weight, bias=bias)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    for launch in plan(x, weight, bias, y, norm_eps=norm_eps, config=config, target=target):
        launch.run(x)
    return y
