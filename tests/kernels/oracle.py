"""What the kernel tests compare with: float64 results, and how far float32 accumulation may be from them."""

import torch
import torch.nn.functional as F

GUARD = 64  # NaN elements on either side of a guarded tensor

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
# The largest slope of any of the activations (hardswish at 3), by which an error before it may grow.
STEEPEST = 1.5
UNIT_ROUNDOFF_FP32 = 2.0**-24


def guarded(tensor: torch.Tensor, offset: int = GUARD) -> torch.Tensor:
    """A copy of `tensor`, same strides, between two bands of NaN: any read past its ends shows in the result."""
    buffer = torch.full(
        (tensor.numel() + offset + GUARD,), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    copy = buffer[offset : offset + tensor.numel()].as_strided(tensor.shape, tensor.stride(), offset)
    return copy.copy_(tensor)


def channel_shape(y: torch.Tensor, channel_dim: int) -> list[int]:
    return [-1 if d == channel_dim % y.dim() else 1 for d in range(y.dim())]


def finish(z, bias, residual, scale, shift, act: str, channel_dim: int = 1) -> torch.Tensor:
    """scale * act(z + bias + residual) + shift, in float64; `z` float64 [N, K, P, Q] or [..., K] (channel_dim -1)."""
    wide = channel_shape(z, channel_dim)
    z = z if bias is None else z + bias.double().view(wide)
    z = z if residual is None else z + residual.double()
    y = ACTIVATIONS[act](z)
    y = y if scale is None else y * scale.double().view(wide)
    return y if shift is None else y + shift.double().view(wide)


def forward_error(
    depth, magnitude, y, bias, residual, scale, shift, dtype, channel_dim: int = 1
) -> torch.Tensor:
    """Bound on |computed - exact|, elementwise, for a sum of `depth` products accumulated in float32.

    The sum errs by c * sqrt(depth) * eps * sum |x||w| (its rounding errors are independent; c = 8 leaves room for
    matrix units, which truncate), the activation by a few ulps, and the result is rounded once to `dtype`.

    Args:
        magnitude: sum |x||w|, float64, shaped like y.
        y: the exact result, float64.
    """
    wide = channel_shape(y, channel_dim)
    for term in (bias, scale, shift):
        assert term is None or term.dim() == 1
    if bias is not None:
        magnitude = magnitude + bias.double().abs().view(wide)
    if residual is not None:
        magnitude = magnitude + residual.double().abs()
    error = STEEPEST * (8 * depth**0.5 + 16) * UNIT_ROUNDOFF_FP32 * (magnitude + 1)
    if scale is not None:
        error = error * scale.double().abs().view(wide)
    if shift is not None:
        error = error + 4 * UNIT_ROUNDOFF_FP32 * shift.double().abs().view(wide)
    limits = torch.finfo(dtype)
    return error + limits.eps / 2 * (y.abs() + error) + limits.smallest_normal * limits.eps


def assert_within(actual: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """|actual - exact| <= bound, elementwise, NaN counted as wrong."""
    error = (actual.double() - exact).abs()
    worst = (error / bound).nan_to_num(nan=float("inf")).max().item() if error.numel() else 0.0
    assert worst <= 1.0, f"error is {worst:.3g} times its bound (largest error {error.max().item():.3g})"
