"""Blocks of every type, dropped whole where input and output have the same shape: merged, nothing is left of them."""

from __future__ import annotations

from typing import Any

from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from depthfuse.merging.adapters.base import Candidate, Lambda, fixed, mix, register
from depthfuse.merging.adapters.vit import TRANSFORMER_BLOCKS
from depthfuse.merging.merged_blocks import Dropped


@register(
    BasicBlock,
    Bottleneck,
    InvertedResidual,
    DepthwiseSeparableConv,
    EdgeResidual,
    ConvNeXtBlock,
    *TRANSFORMER_BLOCKS,
)
class Drop(Candidate):
    """lam * block(x) + (1 - lam) * x."""

    name = "drop"
    alone = False  # exact for every block, but the hardest on accuracy

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        if isinstance(block, BasicBlock | Bottleneck):
            same = block.downsample is None
        elif isinstance(block, ConvNeXtBlock):
            same = isinstance(block.shortcut, nn.Identity)
        else:
            same = getattr(block, "has_skip", True)  # a transformer block has nothing to say: always
        return None if same else "no identity skip: input and output may differ in shape"

    def forward(self, block: nn.Module, x: Tensor, lam: Lambda, **kwargs: Any) -> Tensor:
        return x if fixed(lam, 0.0) else mix(lam, block(x, **kwargs), x)

    def merge(self, block: nn.Module) -> nn.Module:
        return Dropped()
