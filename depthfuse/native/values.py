"""Looks at values, and casts them, without PyTorch's threads: these would spin for some 5 ms on the cores that the
engine needs next, and double the time of a small network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from depthfuse.native.library import ready

_HALVES = {torch.bfloat16: 0, torch.float16: 1}  # as the engine names them


def all_within(x: Tensor, limit: float) -> bool:
    """Whether all values of a floating-point tensor lie in (-limit, limit), as NaN does not."""
    engine = ready()
    if x.dtype in _HALVES:  # NumPy is slow in float16 and has no bfloat16
        x = cast(x, torch.float32)
    if engine is not None and x.dtype is torch.float32 and _is_dense(x) and x.device.type == "cpu":
        return bool(engine.df_all_within(x.data_ptr(), x.numel(), limit))
    values = x.numpy(force=True)
    return bool(values.min() > -limit and values.max() < limit)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without a gradient where the engine does it: from float32 to 16 bits, and back."""
    if x.dtype is dtype:
        return x
    engine = ready()
    pair = {x.dtype, dtype} - {torch.float32}
    (half,) = pair if len(pair) == 1 else (None,)
    if (
        engine is None
        or half not in _HALVES
        or torch.float32 not in (x.dtype, dtype)
        or not _is_dense(x)
        or x.device.type != "cpu"
        or x.is_neg()
    ):
        return x.to(dtype)
    y = torch.empty_like(x, dtype=dtype, device="cpu", requires_grad=False)
    convert = engine.df_narrow if dtype is half else engine.df_widen
    convert(x.data_ptr(), x.numel(), _HALVES[half], y.data_ptr())
    return y


def in_rows(x: Tensor) -> Tensor:
    """A float32 tensor on the CPU as its axes have it: `x.contiguous()`, without a gradient."""
    if x.is_contiguous():
        return x
    return torch.from_numpy(np.ascontiguousarray(x.detach().resolve_neg().numpy()))


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
