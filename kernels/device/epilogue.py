"""The tail that every fused operator ends in: y = scale * act(acc + bias + residual) + shift.

A merged block is Conv -> activation -> BN, so the affine comes after the activation; the residual joins before it.
All of it is float32, whatever the tensors' dtype, and the result is rounded once, at the store.
"""

import triton
import triton.language as tl


@triton.jit
def normal_cdf(x):
    """(1 + erf(x / sqrt(2))) / 2, float32, within 3 * 2^-24; relative error 4e-4 down to -6, where 1 + erf loses all.

    1 / 2^p(|x|) of one side, whose other is 1 minus that. p is the polynomial nearest to -log2 of the function in
    [0, 6], errors weighted by their effect. Vendors' erf takes two branches, and a wave with lanes in both takes the
    time of both: 2 to 3 times as many instructions, as many as a narrow MLP's matrix products.
    """
    u = tl.where(tl.abs(x) > 12.0, 12.0, tl.abs(x))  # past it the side is 0; without, infinity would be NaN
    p = 9.586012765794294e-07
    p = p * u - 1.6731592040741816e-05
    p = p * u + 8.007280848687515e-05
    p = p * u + 0.0003840526333078742
    p = p * u - 0.007367467507719994
    p = p * u + 0.052689772099256516
    p = p * u + 0.4591504633426666
    p = p * u + 1.1511114835739136
    p = p * u + 0.9999998807907104
    side = tl.exp2(-p)
    return tl.where(x < 0.0, side, 1.0 - side)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`x` float32 of any shape. The comparisons are written so that NaN passes through, as in PyTorch."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACTIVATION == "gelu":
        x = x * normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2u), with u = sqrt(2 / pi) * (x + 0.044715 x^3)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        gate = x + 3.0
        x = x * tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate)) * 0.16666666666666666
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def finish(
    acc,  # float32 [ROWS, COLUMNS]
    bias,  # pointer to [channels], or None
    residual,  # pointer to a tensor that is laid out like the output, or None
    scale,  # pointer to [channels], or None
    shift,  # pointer to [channels], or None
    channel,  # [COLUMNS] index into bias, scale and shift
    channel_mask,  # [COLUMNS]
    offset,  # [ROWS, COLUMNS] offset into residual
    mask,  # [ROWS, COLUMNS]
    ACTIVATION: tl.constexpr,
):
    """scale * act(acc + bias + residual) + shift, float32 [ROWS, COLUMNS]."""
    if bias is not None:
        acc += tl.load(bias + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    if scale is not None:
        acc *= tl.load(scale + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        acc += tl.load(shift + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def write_tile(
    acc,  # float32 [BLOCK_M, BLOCK_N]
    bias,  # see finish
    residual,
    scale,
    shift,
    y,  # [rows, WIDTH]
    row,  # [BLOCK_M]
    row_mask,  # [BLOCK_M]
    column,  # the tile's first, a scalar
    columns,  # past the last one that there is
    WIDTH: tl.constexpr,  # elements from one row of y to the next
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Finish a tile of a product and store it; a wide one half by half, whose addresses fit the registers then."""
    HALVES: tl.constexpr = 2 if BLOCK_N > 128 else 1
    PART: tl.constexpr = BLOCK_N // HALVES
    if HALVES == 2:
        parts = tl.permute(tl.reshape(acc, (BLOCK_M, 2, PART)), (0, 2, 1)).split()
    else:
        parts = (acc,)
    for i in tl.static_range(HALVES):
        channel = column + i * PART + tl.arange(0, PART)
        channel_mask = channel < columns
        offset = row[:, None] * WIDTH + channel[None, :]
        mask = row_mask[:, None] & channel_mask[None, :]
        part = finish(parts[i], bias, residual, scale, shift, channel, channel_mask, offset, mask, ACTIVATION)
        tl.store(y + offset, part.to(y.dtype.element_ty), mask=mask)


@triton.jit
def normalize(x, channel_mask, CHANNELS: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm without its affine, over the columns of float32 [ROWS, COLUMNS] that `channel_mask` [COLUMNS] keeps."""
    SHARE: tl.constexpr = 1.0 / CHANNELS  # a division takes ten instructions on AMD
    kept = channel_mask[None, :]
    mean = tl.sum(tl.where(kept, x, 0.0), axis=1)[:, None] * SHARE
    centred = tl.where(kept, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] * SHARE
    return centred * tl.rsqrt(variance + EPS)
