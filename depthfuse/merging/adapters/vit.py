"""ViT and DeiT blocks, timm's, torchvision's and Hugging Face's: the FFN collapses to one linear layer, or the
attention goes, or both.

Pruned (UPDP, fig. 2): [LN | BN] attention (+) [LN | BN] fc1 [GELU | BN] fc2 (+) [- | GELU BN]. Note that the inner
GELU becomes a batch norm and not the identity. Statistics run over batch and tokens, class token included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from depthfuse.merging.merged_blocks import (
    MergedLinear,
    MergedMlpBlock,
    MergedTransformerBlock,
    SelfAttention,
)

_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class TransformerParts:
    """The layers of a block; references to its own modules."""

    norm1: nn.Module
    attn: nn.Module
    scale1: nn.Module  # LayerScale or nothing; then stochastic depth or dropout
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    fc1: nn.Module
    act: nn.Module
    drop1: nn.Module
    fc2: nn.Module
    drop2: nn.Module
    scale2: nn.Module
    gamma2: Tensor | None  # of scale2
    drop_path2: nn.Module

    def attend(self, x: Tensor, **attention: Any) -> Tensor:
        """The attention alone, [B, N, D] -> [B, N, D]."""
        if isinstance(self.attn, Attention):
            return self.attn(x, **attention)
        if isinstance(self.attn, nn.MultiheadAttention):
            return self.attn(x, x, x, need_weights=False, **attention)[0]
        result = self.attn(x, **attention)
        return result[0] if isinstance(result, tuple) else result


def _timm_parts(block: nn.Module) -> TransformerParts:
    mlp, nothing = block.mlp, nn.Identity()
    return TransformerParts(
        block.norm1,
        block.attn,
        block.ls1,
        block.drop_path1,
        block.norm2,
        mlp,
        getattr(mlp, "fc1", nothing),
        getattr(mlp, "act", nothing),
        getattr(mlp, "drop1", nothing),
        getattr(mlp, "fc2", nothing),
        getattr(mlp, "drop2", nothing),
        block.ls2,
        block.ls2.gamma if isinstance(block.ls2, LayerScale) else None,
        block.drop_path2,
    )


def _torchvision_parts(block: nn.Module) -> TransformerParts:
    fc1, act, drop1, fc2, drop2 = block.mlp
    nothing = nn.Identity()
    return TransformerParts(
        block.ln_1,
        block.self_attention,
        nothing,
        block.dropout,
        block.ln_2,
        block.mlp,
        fc1,
        act,
        drop1,
        fc2,
        drop2,
        nothing,
        None,
        nothing,
    )


def _hugging_face_parts(block: nn.Module) -> TransformerParts:
    mlp, nothing = block.mlp, nn.Identity()
    fc1, act, fc2 = mlp.fc1, mlp.activation_fn, mlp.fc2
    return TransformerParts(
        block.layernorm_before,
        block.attention,
        nothing,
        block.dropout,
        block.layernorm_after,
        mlp,
        fc1,
        act,
        nothing,
        fc2,
        nothing,
        nothing,
        None,
        block.dropout,
    )


_READERS: dict[str, Callable[[nn.Module], TransformerParts]] = {
    "torchvision.models.vision_transformer.EncoderBlock": _torchvision_parts,
    "transformers.models.vit.modeling_vit.ViTLayer": _hugging_face_parts,
    "transformers.models.deit.modeling_deit.DeiTLayer": _hugging_face_parts,
}
TRANSFORMER_BLOCKS = (Block, *_READERS)


def read_parts(block: nn.Module) -> TransformerParts:
    """Raises AttributeError or ValueError where the library of the block has changed its layers."""
    kind = plain_type(block)
    return _READERS.get(f"{kind.__module__}.{kind.__qualname__}", _timm_parts)(block)


def _unknown_layers(block: nn.Module) -> str | None:
    try:
        read_parts(block)
    except (AttributeError, TypeError, ValueError) as error:
        return f"its layers are not those of the versions that depthfuse knows ({error})"
    return None


def ffn_refusal(block: nn.Module) -> str | None:
    """Why the FFN cannot become one linear layer, or None."""
    if (unknown := _unknown_layers(block)) is not None:
        return unknown
    if isinstance(block, Block):
        if plain_type(block.mlp) is not Mlp:
            return f"{plain_type(block.mlp).__name__}: a gate depends on the input"
        if not isinstance(block.mlp.norm, nn.Identity):
            return f"{plain_type(block.mlp.norm).__name__} inside the MLP"
        if plain_type(block.ls2) not in (nn.Identity, LayerScale):
            return f"{plain_type(block.ls2).__name__} on the residual"
    parts = read_parts(block)
    for linear in (parts.fc1, parts.fc2):
        if plain_type(linear) is not nn.Linear and not isinstance(block, Block):
            return f"{plain_type(linear).__name__} in the place of a linear layer"
    return None


def _attention_refusal(block: nn.Module) -> str | None:
    """Why a norm cannot be folded into the attention, or None."""
    if isinstance(block, Block):
        if plain_type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
            return f"{plain_type(block.attn).__name__} with a gate or of unknown type"
        return None
    if (unknown := _unknown_layers(block)) is not None:
        return unknown
    attn = read_parts(block).attn
    if isinstance(attn, nn.MultiheadAttention):
        usual = attn.in_proj_weight is not None and attn.batch_first and attn.bias_k is None
        return None if usual and not attn.add_zero_attn else "attention with keys of its own"
    if all(plain_type(getattr(attn, name, None)) is nn.Linear for name in _QUERY_KEY_VALUE):
        return None
    return f"{plain_type(attn).__name__} of unknown layers"


def without_attention(parts: TransformerParts, x: Tensor, lam: Lambda, **attention: Any) -> Tensor:
    """The attention half on its way to nothing (lambda-ViT, Lin et al., CVPR 2024): x doubles as attention fades.

    (2 - lam) * x + lam * attention(x)
    """
    if fixed(lam, 0.0):
        return 2 * x
    attended = parts.drop_path1(parts.scale1(parts.attend(parts.norm1(x), **attention)))
    return (2 - lam) * x + lam * attended


@register(*TRANSFORMER_BLOCKS)
class TransformerFfn(Candidate):
    """attention (+) -> one D x D linear layer -> GELU -> BN, the FFN's skip folded in."""

    name = "ffn"
    layer_norms = True

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return _attention_refusal(block) or ffn_refusal(block)

    def __init__(self, block: nn.Module):
        super().__init__(block)
        parts = read_parts(block)
        like = parts.fc1.weight
        width, hidden = parts.fc1.in_features, parts.fc1.out_features
        self.norm1 = new_token_norm(width, like)
        self.norm2 = new_token_norm(width, like)
        self.norm_mid = new_token_norm(hidden, like)
        self.act = own_activation(parts.act)
        self.tail_norm = new_token_norm(width, like)

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, norm_lam: Lambda | None = None, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        norm_lam = lam if norm_lam is None else norm_lam
        parts = read_parts(block)
        x = self.attend(parts, x, lam, norm_lam, **attention)
        h = parts.fc1(mixed_norm(norm_lam, parts.norm2, self.norm2, x))
        h = self.norm_mid(h) if fixed(lam, 0.0) else mix(lam, self.act(h), self.norm_mid(h))
        h = parts.drop2(parts.fc2(parts.drop1(h)))
        x = x + parts.drop_path2(parts.scale2(h))
        pruned = self.tail_norm(self.act(x))
        return pruned if fixed(lam, 0.0) else mix(lam, x, pruned)

    def attend(
        self, parts: TransformerParts, x: Tensor, lam: Lambda, norm_lam: Lambda, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        attended = parts.attend(mixed_norm(norm_lam, parts.norm1, self.norm1, x), **attention)
        return x + parts.drop_path1(parts.scale1(attended))

    def merge(self, block: nn.Module) -> nn.Module:
        parts = read_parts(block)
        fc = self._merged_ffn(parts).to_linear(parts.fc1.weight)
        tail = copy.deepcopy(self.act), copy.deepcopy(self.tail_norm)
        attn = fold_norm_into_attention(parts.attn, self.norm1)
        return MergedTransformerBlock(attn, copy.deepcopy(parts.scale1), fc, *tail)

    def _merged_ffn(self, parts: TransformerParts) -> LinearConv:
        fc1 = LinearConv.from_linear(fold_norm_before(parts.fc1, self.norm2, double=True))
        fc = compose(LinearConv.from_linear(parts.fc2), fc1.scaled(*norm_affine(self.norm_mid)))
        if parts.gamma2 is not None:
            fc = fc.scaled(parts.gamma2.detach().double())
        return add(fc, LinearConv.identity(fc.in_channels, parts.fc1.weight))


@register(*TRANSFORMER_BLOCKS)
class TransformerAttention(Candidate):
    """Attention removed, the FFN half left as it is, its LayerNorm included: no batch norm, exact as it stands.

    Pruned: x = 2 * x; x + ls2(mlp(norm2(x))). The factor stays: LayerNorm(2 * x) is LayerNorm(x) but for its eps, and
    the skip needs it.
    """

    name = "attention"

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return _unknown_layers(block)  # what is left is copied, whatever it is

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        parts = read_parts(block)
        x = without_attention(parts, x, lam, **attention)
        return x + parts.drop_path2(parts.scale2(parts.mlp(parts.norm2(x))))

    def merge(self, block: nn.Module) -> nn.Module:
        parts = read_parts(block)
        return MergedMlpBlock(*(copy.deepcopy(m) for m in (parts.norm2, parts.mlp, parts.scale2)))


@register(*TRANSFORMER_BLOCKS)
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
        self, parts: TransformerParts, x: Tensor, lam: Lambda, norm_lam: Lambda, **attention: Any
    ) -> Tensor:  # [B, N, D] -> [B, N, D]
        return without_attention(parts, x, lam, **attention)

    def merge(self, block: nn.Module) -> nn.Module:
        parts = read_parts(block)
        ffn = self._merged_ffn(parts)
        fc = replace(ffn, weight=2 * ffn.weight).to_linear(parts.fc1.weight)
        return MergedLinear(fc, copy.deepcopy(self.act), copy.deepcopy(self.tail_norm))


def mixed_norm(lam: Lambda, original: nn.Module, own: nn.Module, x: Tensor) -> Tensor:
    return own(x) if fixed(lam, 0.0) else mix(lam, original(x), own(x))


def fold_norm_before(linear: nn.Linear, norm: nn.BatchNorm1d, double: bool = False) -> nn.Linear:
    """linear(norm(x)) as one linear layer: W diag(s), b + W t; in float64 if `double`, else as `linear` is."""
    scale, shift = norm_affine(norm)
    read = LinearConv.from_linear(linear)
    before = LinearConv.identity(linear.in_features, linear.weight).scaled(scale, shift)
    return compose(read, before).to_linear(read.weight if double else linear.weight)


def fold_norm_into_attention(attn: nn.Module, norm: nn.BatchNorm1d) -> nn.Module:
    """A copy of the attention that computes attention(norm(x)), to be called as timm's is."""
    own = copy.deepcopy(attn)
    if isinstance(attn, Attention):
        own.qkv = fold_norm_before(attn.qkv, norm)
        return own
    if isinstance(attn, nn.MultiheadAttention):
        width = attn.embed_dim
        read = nn.Linear(width, 3 * width, bias=attn.in_proj_bias is not None, device="meta")
        read.weight = attn.in_proj_weight
        if attn.in_proj_bias is not None:
            read.bias = attn.in_proj_bias
        folded = fold_norm_before(read, norm)
        own.in_proj_weight, own.in_proj_bias = folded.weight, folded.bias
    else:
        for name in _QUERY_KEY_VALUE:
            setattr(own, name, fold_norm_before(getattr(attn, name), norm))
    return SelfAttention(own)
