"""ResNet blocks: basic (two 3x3) and bottleneck (1x1, 3x3, 1x1), with every stride and downsample."""

from __future__ import annotations

from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from depthfuse.merging.adapters.base import register
from depthfuse.merging.adapters.chain import (
    Chain,
    Compact,
    ConvChain,
    LastCompact,
    LastIdentity,
    Stage,
)


@register(Bottleneck)
class ResNetDense(ConvChain):
    """The whole block as one convolution: 5x5 for a basic block, 3x3 for a bottleneck."""

    @staticmethod
    def read(block: nn.Module) -> Chain:
        if isinstance(block, BasicBlock):
            stages = (Stage(block.conv1, block.bn1, block.act1), Stage(block.conv2, block.bn2, None))
            end_act = block.act2
        else:
            stages = (
                Stage(block.conv1, block.bn1, block.act1),
                Stage(block.conv2, block.bn2, block.act2),
                Stage(block.conv3, block.bn3, None),
            )
            end_act = block.act3
        shortcut = nn.Identity() if block.downsample is None else block.downsample
        return Chain(stages, shortcut, block.drop_path, end_act, None)

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        if block.se is not None:
            return f"{type(block.se).__name__} gate depends on the input"
        for name in ("aa", "drop_block"):
            if not isinstance(getattr(block, name), nn.Identity):
                return f"{type(getattr(block, name)).__name__} between the convolutions"
        return cls.chain_refusal(cls.read(block))


@register(BasicBlock)
class ResNetCompact(LastCompact, ResNetDense):
    """A basic block as one 3x3: its second 3x3 is annealed to its centre tap, W * (lam + (1 - lam) * centre mask)."""


register(BasicBlock)(ResNetDense)  # after compact: the first one registered is the default


@register(BasicBlock)
class ResNetIdentity(LastIdentity, ResNetDense):
    """A basic block as one 3x3: its second 3x3 is annealed to the identity, lam * W + (1 - lam) * delta."""


@register(Bottleneck)
class BottleneckCompact(Compact, ResNetDense):
    """A bottleneck as one 1x1: its 3x3 is annealed to its centre tap."""
