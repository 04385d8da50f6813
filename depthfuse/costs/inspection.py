"""`depthfuse inspect`: which blocks of a model can be pruned, why not the others, and what each merge would save."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from depthfuse.measuring.counting import count_macs, count_parameters
from depthfuse.merging.adapters import find_blocks
from depthfuse.merging.model_inputs import input_size
from depthfuse.merging.supernet import Supernet
from depthfuse.merging.variants import block_inputs
from depthfuse.spec import KEEP


@dataclass(frozen=True)
class BlockReport:
    """One line of the table: a block in one form. `candidate` is None for a block that cannot be pruned."""

    block: str
    block_type: str
    candidate: str | None
    reason: str
    macs_before: int | None = None
    macs_after: int | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None


def inspect_model(model: nn.Module) -> tuple[list[BlockReport], str]:
    """All blocks of a timm model with MACs (one image of the model's own size) and parameters before and after
    merging, per candidate; and a remark, which is empty unless the table is."""
    infos = find_blocks(model)
    if not infos:
        return [], f"{type(model).__name__} holds no block of a type that depthfuse knows"
    rows: list[BlockReport] = []
    measured: dict[tuple[str, str], tuple[int, int]] = {}
    if any(info.candidates for info in infos):
        net = Supernet(copy.deepcopy(model)).eval()
        given = block_inputs(net, torch.zeros(1, *input_size(model)))
        for path, block in net.blocks.items():
            for name in [KEEP, *block.candidates]:
                block.choice = name
                form = block.fuse()
                measured[path, name] = count_macs(form, given[path].shape[1:]), count_parameters(form)
            block.choice = KEEP
    for info in infos:
        if not info.candidates:
            rows.append(BlockReport(info.path, info.block_type, None, info.reason))
        for candidate in info.candidates:
            (macs, parameters), (merged_macs, merged_parameters) = (
                measured[info.path, name] for name in (KEEP, candidate.name)
            )
            rows.append(
                BlockReport(
                    info.path,
                    info.block_type,
                    candidate.name,
                    info.reason,
                    macs,
                    merged_macs,
                    parameters,
                    merged_parameters,
                )
            )
    return rows, ""
