"""The shapes of a model without its memory: what a file asks for is weighed before it is built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Not linspace, arange and tensor: timm reads such numbers back while it builds, which a tensor without memory cannot
# give (`torch.device("meta")` fails there for half of timm 1.0.20's models). They are small.
_LARGE = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


class ShapesOnly(TorchFunctionMode):
    """Context in which models are built from tensors on the meta device; no global random state moves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _LARGE and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """What the tensors take, whether they have memory or not."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_of_source(tensors: Iterable[torch.Tensor]) -> int:
    """What the model that `tensors` were merged from takes at most.

    Merging keeps most of a model. A ViT of 24 blocks that loses all of them keeps one part in 150, which is as far
    as it can go; a file that asks for a larger source was crafted.
    """
    return max(2**26, 256 * bytes_of(tensors))


def bytes_of_model(model: nn.Module) -> int:
    """Of parameters and buffers."""
    return bytes_of(model.parameters()) + bytes_of(model.buffers())
