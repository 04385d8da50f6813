"""What each merge saves in multiply-accumulates or parameters, counted on merged models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from depthfuse.costs.table import CostTable
from depthfuse.errors import CostError
from depthfuse.measuring.counting import count_macs, count_parameters
from depthfuse.merging.folding import fold_batch_norms
from depthfuse.merging.supernet import Supernet
from depthfuse.merging.variants import block_inputs, kept_copy, merged_model, signature
from depthfuse.spec import KEEP


def count_costs(supernet: Supernet, input_size: tuple[int, int, int], unit: str) -> CostTable:
    """What each candidate of each block saves in "MACs" (of one image) or "parameters", on merged models.

    MACs are exact. Parameters are a bound from above: norms that fold into the next merged block count as kept.

    input_size: (C, H, W). Raises CostError for another unit.
    """
    net = kept_copy(supernet)
    like = next(net.parameters())
    counters: dict[str, Callable[[nn.Module, tuple[int, ...]], int]] = {
        "MACs": lambda form, size: count_macs(form, size, like.device),
        "parameters": lambda form, _: count_parameters(form),
    }
    if unit not in counters:
        raise CostError(f"cannot count {unit!r}; known: {', '.join(counters)}")
    counted: dict[str, int] = {}

    def count(form: nn.Module, given: Tensor) -> int:
        key = signature(form, given)
        if key not in counted:
            form = copy.deepcopy(form)
            fold_batch_norms(form)  # as they are in the whole merged model
            counted[key] = counters[unit](form, tuple(given.shape[1:]))
        return counted[key]

    given = block_inputs(net, torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
    saved: dict[str, dict[str, float]] = {}
    for path, block in net.blocks.items():
        kept = count(block.block, given[path])
        saved[path] = {}
        for name in block.candidates:
            block.choice = name
            saved[path][name] = kept - count(block.fuse(), given[path])
        block.choice = KEEP
    conditions = {
        "model": supernet.source.name,
        "model_kwargs": json.loads(json.dumps(supernet.source.kwargs)),
        "input_size": list(input_size),
        "predicted": False,
    }
    return CostTable(conditions, unit, counters[unit](merged_model(net, {}), input_size), saved)
