"""ConvNeXt V1 blocks: depthwise conv -> norm -> fc1 -> GELU -> fc2 -> LayerScale (+) skip.

Pruned (UPDP, fig. 2): conv [LN | BN] fc1 [GELU | -] fc2 (+) [- | GELU BN]. Only the depthwise convolution is padded,
so borders need no remedy.
"""

from __future__ import annotations

import copy

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


@register(ConvNeXtBlock)
class ConvNeXtFactorised(Candidate):
    """Depthwise then one 1x1 convolution, the skip beside them."""

    name = "factorised"
    layer_norms = True

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        if plain_type(block.mlp) is not Mlp:
            return f"{plain_type(block.mlp).__name__}: GRN or a gate depends on the input"
        if not isinstance(block.mlp.norm, nn.Identity):
            return f"{plain_type(block.mlp.norm).__name__} inside the MLP"
        if not isinstance(block.shortcut, nn.Identity):
            return "the block changes shape between input and skip"
        if plain_type(block.conv_dw) is not nn.Conv2d:
            return f"{plain_type(block.conv_dw).__name__}: padding depends on the input size"
        return None

    def __init__(self, block: nn.Module):
        super().__init__(block)
        channels = block.conv_dw.out_channels
        self.norm = new_batch_norm(channels, block.conv_dw.weight)
        self.act = own_activation(block.mlp.act)
        self.tail_norm = new_batch_norm(channels, block.conv_dw.weight)

    def depthwise(self, conv: nn.Conv2d, x: Tensor, lam: Lambda) -> Tensor:
        return conv(x)

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, norm_lam: Lambda | None = None
    ) -> Tensor:  # [N, C, H, W] -> [N, C, H, W]
        norm_lam = lam if norm_lam is None else norm_lam
        mlp, channels_last = block.mlp, not block.use_conv_mlp
        z = self.depthwise(block.conv_dw, x, lam)
        h = self.norm(z)
        if not fixed(norm_lam, 0.0):
            if channels_last:
                original = block.norm(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                original = block.norm(z)
            h = mix(norm_lam, original, h)
        width, hidden, pixels = z.shape[1], mlp.fc1.weight.shape[0], z.numel() // z.shape[1]
        if fixed(lam, 0.0) and (hidden + pixels) * width < 2 * hidden * pixels:
            # Nothing stands between fc1 and fc2. With enough pixels it is cheaper to multiply their weights once
            # than the map, four times as wide, by each.
            fc1, fc2 = mlp.fc1.weight.flatten(1), mlp.fc2.weight.flatten(1)
            bias = mlp.fc2.bias if mlp.fc1.bias is None else F.linear(mlp.fc1.bias, fc2, mlp.fc2.bias)
            z = F.conv2d(h, (fc2 @ fc1)[:, :, None, None], bias)
        else:
            h = mlp.fc1(h.permute(0, 2, 3, 1) if channels_last else h)
            if not fixed(lam, 0.0):
                h = mix(lam, self.act(h), h)
            h = mlp.fc2(mlp.drop1(h))
            z = h.permute(0, 3, 1, 2) if channels_last else h
        if block.gamma is not None:
            z = z * block.gamma.reshape(1, -1, 1, 1)
        z = block.drop_path(z) + x
        pruned = self.tail_norm(self.act(z))
        return pruned if fixed(lam, 0.0) else mix(lam, z, pruned)

    def _linear_parts(self, block: nn.Module) -> tuple[LinearConv, LinearConv]:
        read = LinearConv.from_conv if block.use_conv_mlp else LinearConv.from_linear
        depthwise = LinearConv.from_conv(block.conv_dw).scaled(*norm_affine(self.norm))
        pointwise = compose(read(block.mlp.fc2), read(block.mlp.fc1))
        if block.gamma is not None:
            pointwise = pointwise.scaled(block.gamma.detach().double())
        return depthwise, pointwise

    def merge(self, block: nn.Module) -> nn.Module:
        like = block.conv_dw.weight
        depthwise, pointwise = self._linear_parts(block)
        tail = copy.deepcopy(self.act), copy.deepcopy(self.tail_norm)
        return MergedFactorised(depthwise.to_conv(like), pointwise.to_conv(like), *tail)


@register(ConvNeXtBlock)
class ConvNeXtDense(ConvNeXtFactorised):
    """One dense 7x7 convolution with the skip inside: exact, but 49 times the multiplications of the 1x1."""

    name = "dense"

    def merge(self, block: nn.Module) -> nn.Module:
        like = block.conv_dw.weight
        depthwise, pointwise = self._linear_parts(block)
        merged = add(compose(pointwise, depthwise), LinearConv.identity(block.conv_dw.in_channels, like))
        return MergedConv(merged.to_conv(like), copy.deepcopy(self.act), copy.deepcopy(self.tail_norm))


@register(ConvNeXtBlock)
class ConvNeXtCompact(ConvNeXtDense):
    """One 1x1 convolution with the skip inside: the depthwise convolution is annealed to its centre tap,
    W * (lam + (1 - lam) * centre mask).
    """

    name = "compact"

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return super().refusal(block) or centre_tap_refusal(block.conv_dw)

    def depthwise(self, conv: nn.Conv2d, x: Tensor, lam: Lambda) -> Tensor:
        tap = centre_tap(conv)
        if fixed(lam, 0.0):
            return F.conv2d(x, tap, conv.bias, conv.stride, groups=conv.groups)
        weight = shrink(lam, conv.weight, tap)
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def _linear_parts(self, block: nn.Module) -> tuple[LinearConv, LinearConv]:
        depthwise, pointwise = super()._linear_parts(block)
        return depthwise.centre_tap(), pointwise
