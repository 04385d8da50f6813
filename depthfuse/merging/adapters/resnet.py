"""ResNet blocks: basic (two 3x3) and bottleneck (1x1, 3x3, 1x1), with every stride and downsample."""

from __future__ import annotations

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from depthfuse.merging.adapters.base import Lambda, fixed, register
from depthfuse.merging.adapters.chain import Chain, Compact, ConvChain, Stage, shortcut_refusal, stage_refusal


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
        chain = cls.read(block)
        reasons = [stage_refusal(stage) for stage in chain.stages] + [shortcut_refusal(chain.shortcut)]
        return next((reason for reason in reasons if reason), None)


@register(BasicBlock)
class ResNetCompact(Compact, ResNetDense):
    """A basic block as one 3x3: its second 3x3 is annealed to its centre tap, W * (lam + (1 - lam) * centre mask).

    UPDP's FLOPs for ResNet-34 fit one saved 3x3 a block; two 3x3 merged exactly make a 5x5, which is slower than
    both. With a 1x1 in second place the block needs no change at its borders either.
    """

    @classmethod
    def annealed(cls, chain: Chain) -> tuple[int, ...]:
        return (len(chain.stages) - 1,)


register(BasicBlock)(ResNetDense)  # after compact: the first one registered is the default


@register(BasicBlock)
class ResNetIdentity(ResNetCompact):
    """A basic block as one 3x3: its second 3x3 is annealed to the identity, lam * W + (1 - lam) * delta."""

    name = "identity"

    @staticmethod
    def tap(conv: nn.Conv2d) -> Tensor:
        eye = torch.eye(conv.out_channels, dtype=conv.weight.dtype, device=conv.weight.device)
        return eye[:, :, None, None]

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        reason = super().refusal(block)
        if reason:
            return reason
        conv = cls.read(block).stages[-1].conv
        if conv.in_channels != conv.out_channels or conv.stride != (1, 1) or conv.groups != 1:
            return "the second convolution has a stride, groups or other channels out than in: no identity"
        return None

    def _conv(self, i: int, conv: nn.Conv2d, x: Tensor, lam: Lambda, fill: Tensor | None) -> Tensor:
        if i in self.shrinking and fixed(lam, 0.0):
            return x if conv.bias is None else x + conv.bias[:, None, None]
        return super()._conv(i, conv, x, lam, fill)


@register(Bottleneck)
class BottleneckCompact(Compact, ResNetDense):
    """A bottleneck as one 1x1: its 3x3 is annealed to its centre tap."""

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        reason = super().refusal(block)
        shortcut = block.downsample
        if reason is None and shortcut is not None and isinstance(shortcut[0], nn.AvgPool2d):
            return "the average pool in the shortcut needs a kernel as large as dense"
        return reason
