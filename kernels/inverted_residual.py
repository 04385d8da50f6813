"""Inverted residual in one launch: expand 1x1, depthwise k x k, project 1x1, skip.

    e[h] = act_inner(sum_c x[c] * w1[h, c] + b1[h])                    at every input pixel, 0 outside the image
    d[h] = act_inner(sum_{r,s} e[h, shifted by r, s] * w2[h, r, s] + b2[h])
    y[k] = scale[k] * act(sum_h d[h] * w3[k, h] + b3[k] + residual[k]) + shift[k]

The expanded tensors e and d are six times as wide as x, and moving them is most of what the three separate layers do.
Here they never leave the chip. A program owns a few patches of the image. For 32 hidden channels at a time it expands
all the patches' input pixels with one matrix product, takes the result apart by position (patches.py), so that the
depthwise sums are plain multiply-adds in registers, and adds the projection of these 32 channels to its accumulator.

The price is the border: a patch of 4 x 4 inputs holds 2 x 2 outputs of a 3x3 kernel, so each input is expanded four
times (2.7 times at stride 2). That pays where images are large and channels few, and is a matter of measurement. It
is for 3x3 kernels and at most 64 channels in and out: past that the rows of the tile do not fit the registers, and the
late, small images are better served by three launches.
"""
# ruff: noqa: RUF005  Triton compiles no starred expressions, so tuples are concatenated.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from depthfuse.kernels.arguments import NO_TAIL, Tail, ThreeLayers
from depthfuse.kernels.depthwise import require_taps
from depthfuse.kernels.device.epilogue import activate, finish
from depthfuse.kernels.device.patches import join_positions, split_positions
from depthfuse.kernels.device.tile import within_reduction
from depthfuse.kernels.launch import (
    Launch,
    Target,
    ceil_div,
    compiler_options,
    empty_image,
    needs_wide_offsets,
    next_power_of_2,
    require_channels_last,
    require_rows,
    require_tail,
    target_of,
)
from depthfuse.kernels.tuning.lookup import tuned

MAX_CHANNELS = 64


@dataclass(frozen=True)
class InvertedResidualConfig:
    """One program of a fused inverted residual.

    Attributes:
        in_h, in_w: input pixels of a patch, powers of 2. Larger patches expand fewer pixels twice, but every pixel
            takes a register for each hidden channel of a thread, and past four outputs a patch Triton's choice of
            layouts breaks down (8 x 8 inputs took minutes to compile, then shuffled 16 bits at a time).
        patches: patches a program; with their pixels they are the rows of the matrix products.
        num_warps: enough that the rows' accumulators leave room for two waves.
        block_hidden: hidden channels a step: 32 is the least depth that keeps the matrix units busy.
    """

    in_h: int
    in_w: int
    patches: int
    num_warps: int
    block_hidden: int = 32

    def options(self, target: Target) -> dict:
        """Compiler options on `target`. One stage: what is loaded in the loop is weights, which are in cache."""
        return compiler_options(target, self.num_warps, 1, nonkdim=16, kpack=2)


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def inverted_residual_kernel(
    x,  # [N, H, W, CHANNELS]
    w1,  # [HIDDEN, CHANNELS]
    b1,  # [HIDDEN]
    w2,  # [HIDDEN, KERNEL, KERNEL], strides W2_STRIDE_C and W2_STRIDE_TAP
    b2,  # [HIDDEN]
    w3,  # [OUT_CHANNELS, HIDDEN]
    b3,  # [OUT_CHANNELS] or None
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
    HIDDEN: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    W2_STRIDE_C: tl.constexpr,
    W2_STRIDE_TAP: tl.constexpr,
    ACT_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets
    PATCHES: tl.constexpr,
    IN_H: tl.constexpr,
    IN_W: tl.constexpr,
    SLOTS: tl.constexpr,  # outputs of a patch, rounded up to a power of 2
    TAP_SLOTS: tl.constexpr,  # KERNEL * KERNEL, likewise
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    INPUTS: tl.constexpr = IN_H * IN_W
    OUT_H: tl.constexpr = (IN_H - KERNEL) // STRIDE + 1
    OUT_W: tl.constexpr = (IN_W - KERNEL) // STRIDE + 1
    first_patch = tl.program_id(0) * PATCHES
    patches_w = tl.cdiv(out_width, OUT_W)
    patches_h = tl.cdiv(out_height, OUT_H)

    # Rows of the first product: every input pixel of every patch.
    row = tl.arange(0, PATCHES * INPUTS)
    patch = first_patch + row // INPUTS
    image = patch // (patches_h * patches_w)
    ih = patch // patches_w % patches_h * (OUT_H * STRIDE) - PADDING + row % INPUTS // IN_W
    iw = patch % patches_w * (OUT_W * STRIDE) - PADDING + row % IN_W
    inside = (image < batch) & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
    if WIDE:
        image = image.to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    c_mask = within_reduction(c, CHANNELS, BLOCK_C)[None, :]
    x_offset = ((image * height + ih) * width + iw)[:, None] * CHANNELS + c[None, :]
    pixels = tl.load(x + x_offset, mask=inside[:, None] & c_mask, other=0.0)

    tap = tl.arange(0, TAP_SLOTS)
    n = tl.arange(0, BLOCK_N)
    n_mask = n < OUT_CHANNELS
    acc = tl.zeros((PATCHES * SLOTS, BLOCK_N), dtype=tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        h = start + tl.arange(0, BLOCK_HIDDEN)
        h_mask = within_reduction(h, HIDDEN, BLOCK_HIDDEN)

        weight = tl.load(w1 + h[:, None] * CHANNELS + c[None, :], mask=h_mask[:, None] & c_mask, other=0.0)
        expanded = tl.dot(pixels, weight.T, input_precision="ieee")
        expanded += tl.load(b1 + h, mask=h_mask, other=0.0).to(tl.float32)[None, :]
        expanded = tl.where(inside[:, None], activate(expanded, ACT_INNER), 0.0)

        at = split_positions(
            tl.permute(tl.reshape(expanded, (PATCHES, INPUTS, BLOCK_HIDDEN)), (0, 2, 1)), INPUTS
        )
        bias = tl.load(b2 + h, mask=h_mask, other=0.0).to(tl.float32)[None, :]
        sums = (tl.broadcast_to(bias, (PATCHES, BLOCK_HIDDEN)),) * (OUT_H * OUT_W)
        # All taps in one load, then split like the tile: one change of layout instead of one a tap.
        w_offset = (h * W2_STRIDE_C)[None, :, None] + (tap * W2_STRIDE_TAP)[None, None, :]
        w_mask = h_mask[None, :, None] & (tap < KERNEL * KERNEL)[None, None, :]
        taps = split_positions(tl.load(w2 + w_offset, mask=w_mask, other=0.0).to(tl.float32), TAP_SLOTS)
        for t in tl.static_range(KERNEL * KERNEL):
            added = ()
            for i in tl.static_range(OUT_H * OUT_W):
                # Output (i // OUT_W, i % OUT_W) under this tap reads the patch's input in that row and that column.
                value = at[(i // OUT_W * STRIDE + t // KERNEL) * IN_W + i % OUT_W * STRIDE + t % KERNEL]
                added = added + (sums[i] + value * taps[t],)
            sums = added
        filtered = ()
        for i in tl.static_range(OUT_H * OUT_W):
            filtered = filtered + (activate(sums[i], ACT_INNER),)
        rows = tl.permute(join_positions(filtered, SLOTS), (0, 2, 1)).to(x.dtype.element_ty)

        weight = tl.load(
            w3 + n[:, None] * HIDDEN + h[None, :], mask=n_mask[:, None] & h_mask[None, :], other=0.0
        )
        acc = tl.dot(tl.reshape(rows, (PATCHES * SLOTS, BLOCK_HIDDEN)), weight.T, acc, input_precision="ieee")

    # Rows of the output: every output pixel of every patch.
    row = tl.arange(0, PATCHES * SLOTS)
    patch = first_patch + row // SLOTS
    slot = row % SLOTS
    image = patch // (patches_h * patches_w)
    p = patch // patches_w % patches_h * OUT_H + slot // OUT_W
    q = patch % patches_w * OUT_W + slot % OUT_W
    exists = (image < batch) & (slot < OUT_H * OUT_W) & (p < out_height) & (q < out_width)
    if WIDE:
        image = image.to(tl.int64)
    offset = ((image * out_height + p) * out_width + q)[:, None] * OUT_CHANNELS + n[None, :]
    mask = exists[:, None] & n_mask[None, :]
    acc = finish(acc, b3, residual, scale, shift, n, n_mask, offset, mask, ACTIVATION)
    tl.store(y + offset, acc.to(y.dtype.element_ty), mask=mask)


def config_for(stride: int, dtype: torch.dtype, target: Target) -> InvertedResidualConfig:
    """The patch for a 3x3 kernel of this stride: four (three) outputs, which the compiler still handles well.

    float32 on NVIDIA has no matrix unit for it, and twice the positions would spill.
    """
    in_h, in_w = (4, 4) if stride == 1 else (4, 8)
    small = target.backend == "interpreter" or (target.backend == "cuda" and dtype == torch.float32)
    return InvertedResidualConfig(in_h, in_w, (128 if small else 256) // (in_h * in_w), 8)


def supports(channels: int, out_channels: int, kernel: int, stride: int) -> bool:
    """Whether the kernel takes an inverted residual of this shape."""
    return max(channels, out_channels) <= MAX_CHANNELS and kernel == 3 and stride in (1, 2)


def plan(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weights: ThreeLayers,  # [hidden, C, 1, 1], [hidden], [hidden, 1, R, R] (*), [hidden], [K, hidden, 1, 1]
    tail: Tail,  # residual [N, K, P, Q] channels_last
    y: torch.Tensor,  # [N, K, P, Q] channels_last
    *,
    stride: int,
    act_inner: str,
    config: InvertedResidualConfig | None,
    target: Target,
) -> Launch:
    """The launch that computes `y`. (*) contiguous, or from depthwise.pack_weight."""
    _, channels, height, width = x.shape
    batch, out_channels, out_height, out_width = y.shape
    hidden, w2 = weights.w1.shape[0], weights.w2
    kernel = w2.shape[2]
    shape = {
        "pixels": batch * out_height * out_width,
        "channels": channels,
        "hidden": hidden,
        "out_channels": out_channels,
        "stride": stride,
    }
    config = config or tuned("inverted_residual", config_for(stride, x.dtype, target), x, target, **shape)
    out_h = (config.in_h - kernel) // stride + 1
    out_w = (config.in_w - kernel) // stride + 1
    arguments = {
        "x": x,
        **weights._asdict(),
        **tail.tensors("b3"),
        "y": y,
        "batch": batch,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        "CHANNELS": channels,
        "HIDDEN": hidden,
        "OUT_CHANNELS": out_channels,
        "KERNEL": kernel,
        "STRIDE": stride,
        "PADDING": kernel // 2,
        "W2_STRIDE_C": w2.stride(0),
        "W2_STRIDE_TAP": w2.stride(3),
        "ACT_INNER": act_inner,
        "ACTIVATION": tail.act,
        "WIDE": needs_wide_offsets(x, y),
        "PATCHES": config.patches,
        "IN_H": config.in_h,
        "IN_W": config.in_w,
        "SLOTS": next_power_of_2(out_h * out_w),
        "TAP_SLOTS": next_power_of_2(kernel * kernel),
        "BLOCK_C": max(16, next_power_of_2(channels)),
        "BLOCK_N": max(16, next_power_of_2(out_channels)),
        "BLOCK_HIDDEN": config.block_hidden,
    }
    patches = batch * ceil_div(out_height, out_h) * ceil_div(out_width, out_w)
    return Launch(
        inverted_residual_kernel, (ceil_div(patches, config.patches),), arguments, config.options(target)
    )


def inverted_residual(
    x: torch.Tensor,  # [N, C, H, W] channels_last
    weights: ThreeLayers,  # [hidden, C, 1, 1], [hidden], [hidden, 1, 3, 3] (*), [hidden], [K, hidden, 1, 1]
    tail: Tail = NO_TAIL,  # residual [N, K, P, Q] channels_last; x itself where the block has a skip
    *,
    stride: int = 1,
    act_inner: str = "relu6",
    config: InvertedResidualConfig | None = None,
) -> torch.Tensor:  # [N, K, P, Q] channels_last
    """Expand 1x1, depthwise 3x3 (padding 1), project 1x1 and skip in one launch; this file's head has the formula.

    (*) contiguous, or from depthwise.pack_weight.

    float16, bfloat16 or float32 in and out; the expanded tensors are float32 up to the projection, which takes them in
    the dtype of `x`. `config` None takes `config_for`'s choice. That the arguments fit each other, and `supports`, is
    for the caller to check, as `depthfuse.ops.inverted_residual` does.

    Raises:
        ValueError: a layout other than the above.
    """
    target = target_of(x)
    require_channels_last(x=x, w1=weights.w1, w3=weights.w3)
    require_taps(w2=weights.w2)
    require_rows(b1=weights.b1, b2=weights.b2)
    require_tail(tail, require_channels_last)
    size = [(extent - 1) // stride + 1 for extent in x.shape[2:]]
    y = empty_image((x.shape[0], weights.w3.shape[0], *size), x)
    plan(x, weights, tail, y, stride=stride, act_inner=act_inner, config=config, target=target).run(x)
    return y
