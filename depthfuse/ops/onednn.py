"""oneDNN's convolution and linear with pre-packed weights and fused post-ops, for the reference backend on
CPU.

PyTorch's eager ops reorder the weights into oneDNN's blocked layout at every call, and run bias, residual and
activation as passes of their own. The private operators that torch.compile emits (`torch.ops.mkldnn`) do
neither.
Being private they may change: `available` tries them on a small case and compares, and everything that uses
this module falls back to plain PyTorch where it says no.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.ops.activations import ACTIVATIONS

logger = logging.getLogger(__name__)


@functools.lru_cache
def available(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused ops run in `dtype` on this CPU and give what plain PyTorch gives."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    mkldnn = torch.ops.mkldnn
    try:
        if dtype == torch.bfloat16:
            if not mkldnn._is_mkldnn_bf16_supported():
                return False
        elif dtype == torch.float16:
            if not mkldnn._is_mkldnn_fp16_supported():
                return False
        elif dtype != torch.float32:
            return False
        return _self_test(dtype)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.info("oneDNN's fused ops do not run in %s here (%s): using plain PyTorch", dtype, error)
        return False


def _self_test(dtype: torch.dtype) -> bool:
    # Small integers: every product and sum is exact in every dtype, so equality is what is asked for.
    values = torch.arange(2 * 8 * 5 * 5) % 5 - 2
    x = values.reshape(2, 8, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.arange(8 * 8 * 9) % 3 - 1).reshape(8, 8, 3, 3).to(dtype)
    bias = torch.arange(8).to(dtype)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    packed = pack_conv2d(weight, x.shape, *geometry)
    expected = F.conv2d(x.float(), weight.float(), bias.float(), padding=1)
    plain = conv2d(x, packed, bias, None, *geometry, "relu")
    added = conv2d(x, packed, bias, x, *geometry, "relu")
    matrix = weight[:, :, 1, 1].contiguous()
    rows = x[:, :, 0, 0].contiguous()
    product = linear(rows, pack_linear(matrix, len(rows)), bias, rows, "relu")
    return (
        torch.equal(plain.float(), expected.relu())
        and torch.equal(added.float(), (expected + x.float()).relu())
        and torch.equal(product.float(), (F.linear(rows.float(), matrix.float(), bias.float()) + rows).relu())
    )


def pack_conv2d(
    weight: Tensor,  # [K, C / groups, R, S]
    input_size: Sequence[int],  # N, C, H, W: the layout is chosen for it, and right for any other
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The weight in oneDNN's own layout, as an opaque tensor."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, list(padding), list(stride), list(dilation), groups, list(input_size)
    )


def pack_linear(weight: Tensor, rows: int) -> Tensor:  # [K, C]
    """The weight in oneDNN's own layout, chosen for `rows` input rows, as an opaque tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def conv2d(
    x: Tensor,  # [N, C, H, W], channels_last (any other is copied)
    packed: Tensor,
    bias: Tensor | None,  # [K]
    residual: Tensor | None,  # like the output
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
) -> Tensor:
    """act(conv(x) + bias + residual) in channels_last."""
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, packed, bias, padding, stride, dilation, groups, *ACTIVATIONS[act].post_op
        )
    # Behind a binary post-op oneDNN's PyTorch binding takes no activation but ReLU, and of grouped convolutions not
    # even that in 16 bits: on some processors it raises.
    fused_act = "relu" if act == "relu" and (groups == 1 or x.dtype == torch.float32) else None
    y = torch.ops.mkldnn._convolution_pointwise.binary(
        x, residual, packed, bias, padding, stride, dilation, groups, "add", 1.0, fused_act, [], None
    )
    return y if fused_act else ACTIVATIONS[act].apply_(y)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, act: str) -> Tensor:
    """act(x W' + bias + residual), x [..., C]."""
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, *ACTIVATIONS[act].post_op)
    y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, bias, "add")
    return ACTIVATIONS[act].apply_(y)
