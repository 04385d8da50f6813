"""Smaller images: what a user may try before any pruning, as a control."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from depthfuse.errors import BudgetError

_STEP = 8  # pixels between the sizes that are tried


class OnSmaller(nn.Module):
    """A net on images that are reduced to `size` x `size` pixels before it; what comes in is of any size."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size

    def reduced(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] as the net gets them."""
        size = (self.size, self.size)
        return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.reduced(x))


def size_within(cost: Callable[[int], float], limit: float, whole: int) -> int:
    """The largest size a multiple of 8 pixels below `whole` whose cost is within the limit, if larger images cost more.

    Raises BudgetError where none of at least a quarter of `whole` is.
    """
    sizes = list(range(whole - _STEP, whole // 4 - 1, -_STEP))
    found = bisect.bisect_left(sizes, True, key=lambda size: cost(size) <= limit)
    if found == len(sizes):
        raise BudgetError(f"images of {whole // 4} pixels do not reach {limit:.4g}")
    return sizes[found]
