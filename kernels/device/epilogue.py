"""The tail that every fused operator ends in: y = scale * act(acc + bias + residual) + shift.

A merged block is Conv -> activation -> BN, so the affine comes after the activation; the residual joins before it.
All of it is float32, whatever the tensors' dtype, and the result is rounded once, at the store.
"""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`x` float32 of any shape. The comparisons are written so that NaN passes through, as in PyTorch."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
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
def normalize(x, channel_mask, CHANNELS: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm without its affine, over the columns of float32 [ROWS, COLUMNS] that `channel_mask` [COLUMNS] keeps."""
    kept = channel_mask[None, :]
    mean = tl.sum(tl.where(kept, x, 0.0), axis=1)[:, None] / CHANNELS
    centred = tl.where(kept, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / CHANNELS
    return centred * tl.rsqrt(variance + EPS)
