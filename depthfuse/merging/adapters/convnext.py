"""ConvNeXt V1 blocks: depthwise conv -> norm -> fc1 -> GELU -> fc2 -> LayerScale (+) skip; timm's, and what
`reading.py` finds to be one.

Pruned (UPDP, fig. 2): conv [LN | BN] fc1 [GELU | -] fc2 (+) [- | GELU BN]. Only the depthwise convolution is padded,
so borders need no remedy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from depthfuse.merging.adapters.base import (
    Candidate,
    Lambda,
    centre_tap,
    centre_tap_refusal,
    fixed,
    mix,
    new_batch_norm,
    own_activation,
    register,
    shrink,
)
from depthfuse.merging.algebra import LinearConv, add, compose, norm_affine
from depthfuse.merging.computed_weights import plain_type
from depthfuse.merging.merged_blocks import MergedConv, MergedFactorised


@dataclass(frozen=True)
class ConvNeXtParts:
    """The layers of a block; references to its own modules."""

    depthwise: nn.Conv2d
    norm: nn.Module
    fc1: nn.Module  # linear, or a 1x1 convolution
    act: nn.Module
    drop: nn.Module | None  # after the activation
    fc2: nn.Module
    channels_last: bool  # whether norm, fc1 and fc2 take [N, H, W, C]
    gamma: Tensor | None  # [C] values
    drop_path: nn.Module | None


@register(ConvNeXtBlock)
class ConvNeXtFactorised(Candidate):
    """Depthwise then one 1x1 convolution, the skip beside them."""

    name = "factorised"
    layer_norms = True

    @staticmethod
    def read(block: nn.Module) -> ConvNeXtParts:
        """The block's layers."""
        mlp = block.mlp
        return ConvNeXtParts(
            block.conv_dw,
            block.norm,
            mlp.fc1,
            mlp.act,
            mlp.drop1,
            mlp.fc2,
            not block.use_conv_mlp,
            block.gamma,
            block.drop_path,
        )

    @classmethod
    def parts_refusal(cls, parts: ConvNeXtParts) -> str | None:
        """Why such parts cannot be merged, or None."""
        conv = parts.depthwise
        if plain_type(conv) is not nn.Conv2d:
            return f"{plain_type(conv).__name__}: padding depends on the input size"
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            return f"convolution padding {conv.padding!r} ({conv.padding_mode})"
        return None

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        if plain_type(block.mlp) is not Mlp:
            return f"{plain_type(block.mlp).__name__}: GRN or a gate depends on the input"
        if not isinstance(block.mlp.norm, nn.Identity):
            return f"{plain_type(block.mlp.norm).__name__} inside the MLP"
        if not isinstance(block.shortcut, nn.Identity):
            return "the block changes shape between input and skip"
        return cls.parts_refusal(cls.read(block))

    def __init__(self, block: nn.Module):
        super().__init__(block)
        parts = self.read(block)
        channels, like = parts.depthwise.out_channels, parts.depthwise.weight
        self.norm = new_batch_norm(channels, like)
        self.act = own_activation(parts.act)
        self.tail_norm = new_batch_norm(channels, like)

    def depthwise(self, conv: nn.Conv2d, x: Tensor, lam: Lambda) -> Tensor:
        return conv(x)

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, norm_lam: Lambda | None = None
    ) -> Tensor:  # [N, C, H, W] -> [N, C, H, W]
        norm_lam = lam if norm_lam is None else norm_lam
        parts = self.read(block)
        channels_last = parts.channels_last
        z = self.depthwise(parts.depthwise, x, lam)
        h = self.norm(z)
        if not fixed(norm_lam, 0.0):
            if channels_last:
                original = parts.norm(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                original = parts.norm(z)
            h = mix(norm_lam, original, h)
        width, hidden, pixels = z.shape[1], parts.fc1.weight.shape[0], z.numel() // z.shape[1]
        if fixed(lam, 0.0) and (hidden + pixels) * width < 2 * hidden * pixels:
            # Nothing stands between fc1 and fc2. With enough pixels it is cheaper to multiply their weights once
            # than the map, four times as wide, by each.
            fc1, fc2 = parts.fc1.weight.flatten(1), parts.fc2.weight.flatten(1)
            bias = parts.fc2.bias if parts.fc1.bias is None else F.linear(parts.fc1.bias, fc2, parts.fc2.bias)
            z = F.conv2d(h, (fc2 @ fc1)[:, :, None, None], bias)
        else:
            h = parts.fc1(h.permute(0, 2, 3, 1) if channels_last else h)
            if not fixed(lam, 0.0):
                h = mix(lam, self.act(h), h)
            h = parts.fc2(h if parts.drop is None else parts.drop(h))
            z = h.permute(0, 3, 1, 2) if channels_last else h
        if parts.gamma is not None:
            z = z * parts.gamma.reshape(1, -1, 1, 1)
        z = (z if parts.drop_path is None else parts.drop_path(z)) + x
        pruned = self.tail_norm(self.act(z))
        return pruned if fixed(lam, 0.0) else mix(lam, z, pruned)

    def _linear_parts(self, block: nn.Module) -> tuple[LinearConv, LinearConv]:
        parts = self.read(block)
        read = LinearConv.from_linear if parts.channels_last else LinearConv.from_conv
        depthwise = LinearConv.from_conv(parts.depthwise).scaled(*norm_affine(self.norm))
        pointwise = compose(read(parts.fc2), read(parts.fc1))
        if parts.gamma is not None:
            pointwise = pointwise.scaled(parts.gamma.detach().double().reshape(-1))
        return depthwise, pointwise

    def merge(self, block: nn.Module) -> nn.Module:
        like = self.read(block).depthwise.weight
        depthwise, pointwise = self._linear_parts(block)
        tail = copy.deepcopy(self.act), copy.deepcopy(self.tail_norm)
        return MergedFactorised(depthwise.to_conv(like), pointwise.to_conv(like), *tail)


@register(ConvNeXtBlock)
class ConvNeXtDense(ConvNeXtFactorised):
    """One dense 7x7 convolution with the skip inside: exact, but 49 times the multiplications of the 1x1."""

    name = "dense"

    def merge(self, block: nn.Module) -> nn.Module:
        like = self.read(block).depthwise.weight
        depthwise, pointwise = self._linear_parts(block)
        merged = add(compose(pointwise, depthwise), LinearConv.identity(depthwise.in_channels, like))
        return MergedConv(merged.to_conv(like), copy.deepcopy(self.act), copy.deepcopy(self.tail_norm))


@register(ConvNeXtBlock)
class ConvNeXtCompact(ConvNeXtDense):
    """One 1x1 convolution with the skip inside: the depthwise convolution is annealed to its centre tap,
    W * (lam + (1 - lam) * centre mask).
    """

    name = "compact"

    @classmethod
    def parts_refusal(cls, parts: ConvNeXtParts) -> str | None:
        return super().parts_refusal(parts) or centre_tap_refusal(parts.depthwise)

    def depthwise(self, conv: nn.Conv2d, x: Tensor, lam: Lambda) -> Tensor:
        tap = centre_tap(conv)
        if fixed(lam, 0.0):
            return F.conv2d(x, tap, conv.bias, conv.stride, groups=conv.groups)
        weight = shrink(lam, conv.weight, tap)
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _linear_parts(self, block: nn.Module) -> tuple[LinearConv, LinearConv]:
        depthwise, pointwise = super()._linear_parts(block)
        return depthwise.centre_tap(), pointwise
