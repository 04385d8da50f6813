"""The functions and methods that a saved plan may call, by name: what computes tensors from tensors and numbers.

A file names functions, and whoever loads it runs them; so nothing is looked up that is not listed here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions
from timm.layers.padding import pad_same

_OPERATORS = """
    add sub mul truediv floordiv mod pow neg pos abs matmul getitem eq ne lt le gt ge and_ or_ not_
    iadd isub imul itruediv
"""
_TORCH = """
    abs add addcmul arange argmax bmm cat chunk clamp clip cos cumsum div einsum eq erf exp expm1 flatten flip floor
    full gather index_select log log1p log_softmax logical_and logical_or masked_fill matmul max maximum mean min
    minimum movedim mul narrow ne neg norm ones permute pow prod reciprocal relu relu_ repeat_interleave reshape roll
    rsqrt scatter sigmoid sign sin softmax split sqrt square squeeze stack std sub sum swapaxes tanh tensordot tile
    transpose tril triu unbind unflatten unsqueeze var where zeros _assert
"""
_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d batch_norm conv1d conv2d conv3d
    conv_transpose2d elu fold gelu glu grid_sample group_norm hardsigmoid hardswish hardtanh instance_norm interpolate
    layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid lp_pool2d max_pool1d max_pool2d mish
    normalize one_hot pad pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm scaled_dot_product_attention selu
    sigmoid silu softmax softmin softplus softsign tanh tanhshrink unfold upsample
"""
_METHODS = """
    abs add add_ addcmul amax amin argmax bfloat16 bmm bool chunk clamp clamp_ clone contiguous cos cumsum dim div div_
    double eq exp expand expand_as fill_ flatten flip float floor gather half index_select int lerp log log_softmax
    long masked_fill masked_fill_ matmul max mean min movedim mul mul_ narrow ndimension ne neg norm numel permute pow
    prod reciprocal relu relu_ repeat repeat_interleave reshape reshape_as roll round rsqrt select sigmoid sigmoid_
    sign sin size softmax split sqrt square squeeze std sub sub_ sum swapaxes t tanh tile to transpose type type_as
    unbind unflatten unfold unsqueeze var view view_as where
"""
METHODS = frozenset(_METHODS.split())
ATTRIBUTES = frozenset(("shape", "dtype", "device", "ndim", "T", "mT"))


def _named() -> dict[str, Callable[..., Any]]:
    named: dict[str, Callable[..., Any]] = {"getattr": getattr}
    for prefix, module, names in (
        ("operator", operator, _OPERATORS),
        ("torch", torch, _TORCH),
        ("functional", F, _FUNCTIONAL),
    ):
        named |= {
            f"{prefix}.{name}": getattr(module, name) for name in names.split() if hasattr(module, name)
        }
    # timm's, which it registers because they compute on shapes and cannot be traced.
    for function in [pad_same, *get_notrace_functions()]:
        named[f"{function.__module__}.{function.__name__}"] = function
    return named


FUNCTIONS = _named()
NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
