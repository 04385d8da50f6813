"""The fused ops: each declared once, with a PyTorch reference and, where it pays, a Triton kernel behind one schema."""

from depthfuse.errors import BackendError
from depthfuse.ops.activations import ACTIVATIONS
from depthfuse.ops.attention import attention, attention_reference
from depthfuse.ops.backend import resolve_backend
from depthfuse.ops.conv2d import conv2d, conv2d_reference
from depthfuse.ops.depthwise_pointwise import depthwise_pointwise, depthwise_pointwise_reference
from depthfuse.ops.inverted_residual import inverted_residual, inverted_residual_reference
from depthfuse.ops.linear import linear, linear_reference
from depthfuse.ops.mlp import mlp, mlp_reference
from depthfuse.ops.pool_linear import pool_linear, pool_linear_reference
from depthfuse.ops.winograd import winograd_conv2d, winograd_conv2d_reference

__all__ = [
    "ACTIVATIONS",
    "BackendError",
    "attention",
    "attention_reference",
    "conv2d",
    "conv2d_reference",
    "depthwise_pointwise",
    "depthwise_pointwise_reference",
    "inverted_residual",
    "inverted_residual_reference",
    "linear",
    "linear_reference",
    "mlp",
    "mlp_reference",
    "pool_linear",
    "pool_linear_reference",
    "resolve_backend",
    "winograd_conv2d",
    "winograd_conv2d_reference",
]
