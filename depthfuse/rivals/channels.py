"""Channel pruning, the kind of method that depth pruning competes with: the library torch-pruning, as a rival."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from timm.layers.attention import Attention
from torch import nn

from depthfuse.errors import BudgetError


def prune_channels(model: nn.Module, size: tuple[int, int, int], ratio: float) -> nn.Module:
    """A copy of `model` with a share of the channels of every group of layers removed, by magnitude.

    Which channels are coupled is found by torch-pruning (DepGraph, Fang et al., CVPR 2023), which must be installed.

    Args:
        size: (C, H, W) of the model's images.
        ratio: share of the channels to remove, in [0, 1). Channel counts stay multiples of 4, as fast kernels want.

    Raises BudgetError where torch-pruning is missing.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise BudgetError(
            'channel pruning needs torch-pruning: pip install "depthfuse[rivals]", or leave the method out'
        ) from error
    pruned = copy.deepcopy(model)
    if ratio == 0.0:
        return pruned
    attentions = [m for m in pruned.modules() if isinstance(m, Attention)]
    device = next(pruned.parameters()).device
    pruner = torch_pruning.pruner.BasePruner(
        pruned,
        torch.zeros(1, *size, device=device),
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        ignored_layers=[pruned.get_classifier()],
        num_heads={a.qkv: a.num_heads for a in attentions},
        round_to=None if attentions else 4,
    )
    pruner.step()
    for attention in attentions:  # timm keeps the shape beside the weights
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.qkv.out_features // 3
    return pruned


def ratio_within(cost: Callable[[float], float], limit: float, step: float = 0.1, refine: int = 3) -> float:
    """The smallest ratio whose cost is within the limit, to step / 2**refine.

    Walks up, because at the upper end layers that would lose all their channels lose none. Raises BudgetError where no
    ratio below 1 is enough.
    """
    high = step
    while cost(high) > limit:
        high += step
        if high > 1.0 - step / 2:
            raise BudgetError(f"channel pruning does not reach {limit:.4g}")
    low = high - step
    for _ in range(refine):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= limit else (middle, high)
    return high
