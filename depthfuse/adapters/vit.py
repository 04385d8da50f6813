"""ViT and DeiT blocks: the FFN collapses to one linear layer, attention and its skip stay.

Pruned (UPDP, fig. 2): [LN | BN] attention (+) [LN | BN] fc1 [GELU | BN] fc2 (+) [- | GELU BN]. Note that the inner
GELU becomes a batch norm and not the identity. Statistics run over batch and tokens, class token included.
"""

from __future__ import annotations

import copy
from typing import Any

from timm.layers import LayerScale, Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from depthfuse.adapters.base import Candidate, mix, new_token_norm, own_activation, register
from depthfuse.algebra import LinearConv, add, compose, norm_affine
from depthfuse.blocks import MergedTransformerBlock


@register(Block)
class TransformerFfn(Candidate):
    """attention (+) -> one D x D linear layer -> GELU -> BN, the FFN's skip folded in."""

    name = "ffn"

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        if type(block.mlp) is not Mlp:
            return f"{type(block.mlp).__name__}: a gate depends on the input"
        if not isinstance(block.mlp.norm, nn.Identity):
            return f"{type(block.mlp.norm).__name__} inside the MLP"
        if type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
            return f"{type(block.attn).__name__} with a gate or of unknown type"
        for scale in (block.ls1, block.ls2):
            if type(scale) not in (nn.Identity, LayerScale):
                return f"{type(scale).__name__} on the residual"
        return None

    def __init__(self, block: nn.Module):
        super().__init__()
        like = block.mlp.fc1.weight
        width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        self.norm1 = new_token_norm(width, like)
        self.norm2 = new_token_norm(width, like)
        self.norm_mid = new_token_norm(hidden, like)
        self.act = own_activation(block.mlp.act)
        self.tail_norm = new_token_norm(width, like)

    def forward(
        self, block: nn.Module, x: Tensor, lam: float, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        def norm(original: nn.Module, own: nn.Module, z: Tensor) -> Tensor:
            return own(z) if lam == 0.0 else mix(lam, original(z), own(z))

        mlp = block.mlp
        attended = block.attn(norm(block.norm1, self.norm1, x), **attention)
        x = x + block.drop_path1(block.ls1(attended))
        h = mlp.fc1(norm(block.norm2, self.norm2, x))
        h = self.norm_mid(h) if lam == 0.0 else mix(lam, self.act(h), self.norm_mid(h))
        h = mlp.drop2(mlp.fc2(mlp.drop1(h)))
        x = x + block.drop_path2(block.ls2(h))
        pruned = self.tail_norm(self.act(x))
        return pruned if lam == 0.0 else mix(lam, x, pruned)

    def merge(self, block: nn.Module) -> MergedTransformerBlock:
        like = block.mlp.fc1.weight
        attn = copy.deepcopy(block.attn)
        attn.qkv = fold_norm_before(block.attn.qkv, self.norm1)
        fc1 = LinearConv.from_linear(fold_norm_before(block.mlp.fc1, self.norm2, double=True))
        fc = compose(LinearConv.from_linear(block.mlp.fc2), fc1.scaled(*norm_affine(self.norm_mid)))
        if isinstance(block.ls2, LayerScale):
            fc = fc.scaled(block.ls2.gamma.detach().double())
        fc = add(fc, LinearConv.identity(fc.in_channels, like))
        tail = copy.deepcopy(self.act), copy.deepcopy(self.tail_norm)
        return MergedTransformerBlock(attn, copy.deepcopy(block.ls1), fc.to_linear(like), *tail)


def fold_norm_before(linear: nn.Linear, norm: nn.BatchNorm1d, double: bool = False) -> nn.Linear:
    """linear(norm(x)) as one linear layer: W diag(s), b + W t; in float64 if `double`, else as `linear` is."""
    scale, shift = norm_affine(norm)
    read = LinearConv.from_linear(linear)
    before = LinearConv.identity(linear.in_features, linear.weight).scaled(scale, shift)
    return compose(read, before).to_linear(read.weight if double else linear.weight)
