"""How far the blocks of a net are from those of its teacher on the same images (FitNets, Romero et al., ICLR 2015)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.merging.merged_blocks import first_of


@contextmanager
def recorded(net: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """{path: output of the last call of that module}, of the calls of `net` inside.

    Copies, with their gradients, as the next module may write over its input.
    """
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[path] = first_of(output).clone()

        return hook

    handles = [net.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def feature_loss(outputs: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Mean over the blocks of the squared error over the variance of what is wanted: 1 is no better than a constant.

    outputs, wanted: {path: [N, ...]}, of equal shapes. Returns a float32 scalar.
    """
    shares = []
    for path, output in outputs.items():
        target = wanted[path].detach().float()
        variance = target.var(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
        shares.append((output.float() - target).square().mean() / variance)
    return torch.stack(shares).mean()
