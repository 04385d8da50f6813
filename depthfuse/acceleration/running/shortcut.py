"""The usual call, one tensor in and one out through the native engine, in as few steps of Python as it takes.

A network that just ran leaves nothing of Python in the cores' caches. What any call needs (arguments by name, trees,
forms, casts) then takes 0.2 ms, a tenth of a small network; this takes a tenth of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthfuse.native.library import library
from depthfuse.native.plan import NativePlan
from depthfuse.native.values import cast


@dataclass(frozen=True, eq=False)
class Shortcut:
    """Runs `plan` on a dense tensor of exactly this shape, whose values lie in (-limit, limit).

    dtype: of the accelerated model. It is given tensors of that, or float32, which is rounded to it.
    """

    plan: NativePlan
    dtype: torch.dtype
    shape: torch.Size
    output: torch.Size
    limit: float

    def __call__(self, x: object) -> Tensor | None:
        """The output, or None for anything that takes more to answer, or to refuse."""
        fits = (
            type(x) is Tensor
            and (x.dtype is self.dtype or x.dtype is torch.float32)
            and x.shape == self.shape
            and x.is_cpu
            and x.is_contiguous()
            and not x.is_neg()
            and not torch.is_autocast_enabled("cpu")
        )
        if not fits:
            return None
        if self.dtype is not torch.float32:
            x = cast(cast(x, self.dtype), torch.float32)
        if not library().df_all_within(x.data_ptr(), self.shape.numel(), self.limit):
            return None
        y = torch.empty(self.output, dtype=torch.float32, device="cpu")
        self.plan.run_one(x, y, torch.get_num_threads())
        return cast(y, self.dtype)
