"""The fused ops: convolution and linear with bias, residual, activation and affine behind one schema each."""

from depthfuse.ops.activations import ACTIVATIONS
from depthfuse.ops.backend import BackendError, resolve_backend
from depthfuse.ops.conv2d import conv2d, conv2d_reference
from depthfuse.ops.linear import linear, linear_reference

__all__ = [
    "ACTIVATIONS",
    "BackendError",
    "conv2d",
    "conv2d_reference",
    "linear",
    "linear_reference",
    "resolve_backend",
]
