"""MobileNetV2's blocks and kin: inverted residual, depthwise-separable and fused (edge) residual, without SE."""

from __future__ import annotations

from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from torch import nn

from depthfuse.merging.adapters.base import register
from depthfuse.merging.adapters.chain import Chain, Compact, ConvChain, Stage


@register(InvertedResidual, DepthwiseSeparableConv, EdgeResidual)
class MobileNetDense(ConvChain):
    """The whole block as one dense 3x3 (or 5x5) convolution between its thin ends."""

    @staticmethod
    def read(block: nn.Module) -> Chain:
        if isinstance(block, InvertedResidual):
            pairs = ((block.conv_pw, block.bn1), (block.conv_dw, block.bn2), (block.conv_pwl, block.bn3))
        elif isinstance(block, DepthwiseSeparableConv):
            pairs = ((block.conv_dw, block.bn1), (block.conv_pw, block.bn2))
        else:
            pairs = ((block.conv_exp, block.bn1), (block.conv_pwl, block.bn2))
        inner = tuple(Stage(conv, norm, getattr(norm, "act", None)) for conv, norm in pairs[:-1])
        shortcut = nn.Identity() if block.has_skip else None
        return Chain((*inner, Stage(*pairs[-1], None)), shortcut, block.drop_path, None, inner[0].act)

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        if not isinstance(block.se, nn.Identity):
            return f"SE gate ({type(block.se).__name__}) depends on the input"
        if not isinstance(block.aa, nn.Identity):
            return f"{type(block.aa).__name__} between the convolutions"
        if getattr(block, "conv_s2d", None) is not None:
            return "space-to-depth convolution"
        if getattr(block, "has_pw_act", False):
            return "activation between the last convolution and the skip"
        return cls.chain_refusal(cls.read(block))


@register(InvertedResidual, DepthwiseSeparableConv, EdgeResidual)
class MobileNetCompact(Compact, MobileNetDense):
    """The whole block as one 1x1 convolution: its 3x3 (or 5x5) is annealed to its centre tap."""
