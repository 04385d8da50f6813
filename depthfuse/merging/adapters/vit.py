"""ViT and DeiT blocks: the FFN collapses to one linear layer, or the attention goes, or both.

Pruned (UPDP, fig. 2): [LN | BN] attention (+) [LN | BN] fc1 [GELU | BN] fc2 (+) [- | GELU BN]. Note that the inner
GELU becomes a batch norm and not the identity. Statistics run over batch and tokens, class token included.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from timm.layers import LayerScale, Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from depthfuse.merging.adapters.base import (
    Candidate,
    Lambda,
    fixed,
    mix,
    new_token_norm,
    own_activation,
    register,
)
from depthfuse.merging.algebra import LinearConv, add, compose, norm_affine
from depthfuse.merging.computed_weights import plain_type
from depthfuse.merging.merged_blocks import MergedLinear, MergedMlpBlock, MergedTransformerBlock


def ffn_refusal(block: nn.Module) -> str | None:
    """Why the FFN cannot become one linear layer, or None."""
    if plain_type(block.mlp) is not Mlp:
        return f"{plain_type(block.mlp).__name__}: a gate depends on the input"
    if not isinstance(block.mlp.norm, nn.Identity):
        return f"{plain_type(block.mlp.norm).__name__} inside the MLP"
    if plain_type(block.ls2) not in (nn.Identity, LayerScale):
        return f"{plain_type(block.ls2).__name__} on the residual"
    return None


def without_attention(block: nn.Module, x: Tensor, lam: Lambda, **attention: Any) -> Tensor:
    """The attention half on its way to nothing (lambda-ViT, Lin et al., CVPR 2024): x doubles as attention fades.

    (2 - lam) * x + lam * attention(x)
    """
    if fixed(lam, 0.0):
        return 2 * x
    attended = block.drop_path1(block.ls1(block.attn(block.norm1(x), **attention)))
    return (2 - lam) * x + lam * attended


@register(Block)
class TransformerFfn(Candidate):
    """attention (+) -> one D x D linear layer -> GELU -> BN, the FFN's skip folded in."""

    name = "ffn"
    layer_norms = True

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        if plain_type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
            return f"{plain_type(block.attn).__name__} with a gate or of unknown type"
        return ffn_refusal(block)

    def __init__(self, block: nn.Module):
        super().__init__(block)
        like = block.mlp.fc1.weight
        width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        self.norm1 = new_token_norm(width, like)
        self.norm2 = new_token_norm(width, like)
        self.norm_mid = new_token_norm(hidden, like)
        self.act = own_activation(block.mlp.act)
        self.tail_norm = new_token_norm(width, like)

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, norm_lam: Lambda | None = None, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        norm_lam = lam if norm_lam is None else norm_lam
        x = self.attend(block, x, lam, norm_lam, **attention)
        mlp = block.mlp
        h = mlp.fc1(mixed_norm(norm_lam, block.norm2, self.norm2, x))
        h = self.norm_mid(h) if fixed(lam, 0.0) else mix(lam, self.act(h), self.norm_mid(h))
        h = mlp.drop2(mlp.fc2(mlp.drop1(h)))
        x = x + block.drop_path2(block.ls2(h))
        pruned = self.tail_norm(self.act(x))
        return pruned if fixed(lam, 0.0) else mix(lam, x, pruned)

    def attend(
        self, block: nn.Module, x: Tensor, lam: Lambda, norm_lam: Lambda, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        attended = block.attn(mixed_norm(norm_lam, block.norm1, self.norm1, x), **attention)
        return x + block.drop_path1(block.ls1(attended))

    def merge(self, block: nn.Module) -> nn.Module:
        attn = copy.deepcopy(block.attn)
        attn.qkv = fold_norm_before(block.attn.qkv, self.norm1)
        fc = self._merged_ffn(block).to_linear(block.mlp.fc1.weight)
        tail = copy.deepcopy(self.act), copy.deepcopy(self.tail_norm)
        return MergedTransformerBlock(attn, copy.deepcopy(block.ls1), fc, *tail)

    def _merged_ffn(self, block: nn.Module) -> LinearConv:
        fc1 = LinearConv.from_linear(fold_norm_before(block.mlp.fc1, self.norm2, double=True))
        fc = compose(LinearConv.from_linear(block.mlp.fc2), fc1.scaled(*norm_affine(self.norm_mid)))
        if isinstance(block.ls2, LayerScale):
            fc = fc.scaled(block.ls2.gamma.detach().double())
        return add(fc, LinearConv.identity(fc.in_channels, block.mlp.fc1.weight))


@register(Block)
class TransformerAttention(Candidate):
    """Attention removed, the FFN half left as it is, its LayerNorm included: no batch norm, exact as it stands.

    Pruned: x = 2 * x; x + ls2(mlp(norm2(x))). The factor stays: LayerNorm(2 * x) is LayerNorm(x) but for its eps, and
    the skip needs it.
    """

    name = "attention"

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return None  # what is left is copied, whatever it is

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        x = without_attention(block, x, lam, **attention)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def merge(self, block: nn.Module) -> nn.Module:
        return MergedMlpBlock(*(copy.deepcopy(m) for m in (block.norm2, block.mlp, block.ls2)))


@register(Block)
class TransformerLinear(TransformerFfn):
    """Attention removed and the FFN merged: one D x D linear layer -> GELU -> BN, the factor 2 inside its weight."""

    name = "linear"

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return ffn_refusal(block)

    def __init__(self, block: nn.Module):
        super().__init__(block)
        del self.norm1  # the attention keeps its LayerNorm as long as it lasts

    def attend(
        self, block: nn.Module, x: Tensor, lam: Lambda, norm_lam: Lambda, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        return without_attention(block, x, lam, **attention)

    def merge(self, block: nn.Module) -> nn.Module:
        ffn = self._merged_ffn(block)
        fc = replace(ffn, weight=2 * ffn.weight).to_linear(block.mlp.fc1.weight)
        return MergedLinear(fc, copy.deepcopy(self.act), copy.deepcopy(self.tail_norm))


def mixed_norm(lam: Lambda, original: nn.Module, own: nn.Module, x: Tensor) -> Tensor:
    return own(x) if fixed(lam, 0.0) else mix(lam, original(x), own(x))


def fold_norm_before(linear: nn.Linear, norm: nn.BatchNorm1d, double: bool = False) -> nn.Linear:
    """linear(norm(x)) as one linear layer: W diag(s), b + W t; in float64 if `double`, else as `linear` is."""
    scale, shift = norm_affine(norm)
    read = LinearConv.from_linear(linear)
    before = LinearConv.identity(linear.in_features, linear.weight).scaled(scale, shift)
    return compose(read, before).to_linear(read.weight if double else linear.weight)
