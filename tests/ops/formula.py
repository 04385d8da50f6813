"""The formula of the ops in float64, and how far a computation in a narrower type may be from it."""

import torch
import torch.nn.functional as F

# For each activation name of the schema, the function it stands for, written with torch alone.
ACT = {
    "none": lambda z: z,
    "relu": lambda z: z.clamp_min(0),
    "relu6": lambda z: z.clamp(0, 6),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
    "silu": lambda z: z * torch.sigmoid(z),
    "hardswish": lambda z: z * (z + 3).clamp(0, 6) / 6,
}
EXACT_ACTS = ("none", "relu", "relu6")  # integers stay integers
# No activation is steeper than hardswish at 3, so no error before it grows by more than this.
STEEPEST = 1.5


def exact(product, weight, vectors, residual, act, channel_axis, inner_depths=()):
    """(y, bound): scale * act(product + bias + residual) + shift in float64 and the allowed |computed - y|.

    Args:
        product: (magnitudes) -> the product in float64, without bias; of the operands' magnitudes where `magnitudes`.
        weight: of the product, [K, ...].
        vectors: {"bias", "scale", "shift"} -> [K] or None, in the tested dtype.
        inner_depths: of an op of several layers, the lengths of the sums in the layers before this product.

    The bound: a sum of n products, rounded at each step in the tested dtype with unit roundoff u, is off by at most
    c * u * sqrt(n) * sum |x||w| (independent errors); each step after it adds a few u of its operands. The error of
    an inner layer grows by the steepest slope at each activation behind it.
    """
    dtype = weight.dtype
    growth = 0.0
    for depth in (*inner_depths, weight[0].numel()):
        growth = STEEPEST * (growth + 8 * depth**0.5 + 16)

    def wide(name):
        vector = vectors.get(name)
        shape = [1] * product(False).dim()
        shape[channel_axis] = -1
        return None if vector is None else vector.double().reshape(shape)

    z, magnitude = product(False), product(True)
    for term in (wide("bias"), None if residual is None else residual.double()):
        if term is not None:
            z, magnitude = z + term, magnitude + term.abs()
    u = torch.finfo(dtype).eps / 2
    y, error = ACT[act](z), growth * u * magnitude
    scale, shift = wide("scale"), wide("shift")
    if scale is not None:
        y, error = y * scale, (error + 2 * u * y.abs()) * scale.abs()
    if shift is not None:
        y, error = y + shift, error + 2 * u * (y.abs() + shift.abs())
    return y, error + 2 * u * y.abs() + torch.finfo(dtype).tiny


def conv_product(x, weight, **geometry):
    """The product argument of `exact` for a convolution: called with True it multiplies magnitudes."""

    def product(magnitudes):
        operands = (x.double().abs(), weight.double().abs()) if magnitudes else (x.double(), weight.double())
        return F.conv2d(*operands, **geometry)

    return product


def linear_product(x, weight):
    """The product argument of `exact` for a linear layer."""

    def product(magnitudes):
        operands = (x.double().abs(), weight.double().abs()) if magnitudes else (x.double(), weight.double())
        return operands[0] @ operands[1].T

    return product


def normalized(x, eps):
    """(value, magnitude): LayerNorm without affine over the last axis of float64 x, written out, and its magnitude.

    An error e of every input moves the normalised value by at most (2 + |value|) e / deviation, so an error that is a
    fraction of the largest input is that fraction of the magnitude.
    """
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    value = centred / deviation
    return value, (2 + value.abs()) * x.abs().amax(-1, keepdim=True) / deviation


def assert_within(computed, y, bound):
    """|computed - y| <= bound for every element; NaN counts as wrong."""
    assert computed.shape == y.shape
    if y.numel():
        worst = ((computed.double() - y).abs() / bound).nan_to_num(nan=float("inf")).max().item()
        assert worst <= 1, f"the error is {worst:.3g} times its bound"


def integers(shape, dtype, largest=1):
    return torch.randint(-largest, largest + 1, shape).to(dtype)
