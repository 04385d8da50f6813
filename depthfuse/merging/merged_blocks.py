"""What a block becomes after merging: plain trainable modules, in the dtype of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over the last axis of x [..., C]: the statistics run over batch and tokens, class token included."""

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class MergedConv(nn.Module):
    """conv -> act -> norm: a merged ResNet, MobileNet or dense ConvNeXt block (UPDP, fig. 2).

    The norm follows a non-linearity and therefore stays.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module, norm: nn.BatchNorm2d):
        super().__init__()
        self.conv, self.act, self.norm = conv, act, norm

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, K, H', W']
        return self.norm(self.act(self.conv(x)))


class MergedFactorised(nn.Module):
    """(pointwise(depthwise(x)) + x) -> act -> norm: a merged ConvNeXt block with its skip beside the convolutions.

    A dense 7x7 kernel would cost 49 times the pointwise one; a depthwise and a 1x1 convolution with nothing between
    them are the same map.
    """

    def __init__(self, depthwise: nn.Conv2d, pointwise: nn.Conv2d, act: nn.Module, norm: nn.BatchNorm2d):
        super().__init__()
        self.depthwise, self.pointwise, self.act, self.norm = depthwise, pointwise, act, norm

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, H, W]
        return self.norm(self.act(self.pointwise(self.depthwise(x)) + x))


class SelfAttention(nn.Module):
    """Attention of torch's or Hugging Face's, called as timm's is: x [B, N, D] -> [B, N, D]."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **others: Any) -> Tensor:
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.attention(x, x, x, need_weights=False, attn_mask=attn_mask, **others)[0]
        return self.attention(x, attn_mask, **others)[0]


class MergedTransformerBlock(nn.Module):
    """attention (+) -> fc -> act -> norm: a merged ViT block. The norm before the attention is folded into its qkv."""

    def __init__(
        self, attn: nn.Module, scale: nn.Module, fc: nn.Linear, act: nn.Module, norm: TokenBatchNorm
    ):
        super().__init__()
        self.attn, self.scale, self.fc, self.act, self.norm = attn, scale, fc, act, norm

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        **others: Any,  # what Hugging Face's models hand through to their attention, such as use_cache
    ) -> Tensor:  # [B, N, D]
        # is_causal only where asked for: timm's older attention does not know it
        if is_causal:
            others["is_causal"] = True
        mask = attention_mask if attn_mask is None else attn_mask  # timm's name, Hugging Face's
        x = x + self.scale(self.attn(x, attn_mask=mask, **others))
        return self.norm(self.act(self.fc(x)))


class MergedMlpBlock(nn.Module):
    """A ViT block without its attention: x = 2 * x, then x + mlp(norm(x)); see `TransformerAttention`."""

    def __init__(self, norm: nn.Module, mlp: nn.Module, scale: nn.Module):
        super().__init__()
        self.norm, self.mlp, self.scale = norm, mlp, scale

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:  # [B, N, D]; masks are of no use
        x = x + x  # oneDNN Graph refuses a product with a number
        return x + self.scale(self.mlp(self.norm(x)))


class MergedLinear(nn.Module):
    """fc -> act -> norm: a ViT block without its attention, its FFN merged."""

    def __init__(self, fc: nn.Linear, act: nn.Module, norm: TokenBatchNorm):
        super().__init__()
        self.fc, self.act, self.norm = fc, act, norm

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:  # [B, N, D]; masks are of no use
        return self.norm(self.act(self.fc(x)))


def first_of(output: Any) -> Tensor:
    """What a block gives: the first value of a tuple, or the value itself."""
    return output[0] if isinstance(output, tuple) else output


def with_first(output: Any, first: Tensor) -> Any:
    """What a block returns, with another first value."""
    return (first, *output[1:]) if isinstance(output, tuple) else first


class MergedFeedForward(nn.Module):
    """A block whose feed-forward branch is one linear layer -> act -> norm. `block` is the code of the original one,
    `layer` where the linear layer lies in it."""

    def __init__(self, block: nn.Module, layer: str, act: nn.Module, norm: nn.Module):
        super().__init__()
        self.block, self.layer, self.act, self.norm = block, layer, act, norm

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # what the block returns
        output = self.block(x, *args, **kwargs)
        return with_first(output, self.norm(self.act(first_of(output))))


class PartlyIdle(nn.Module):
    """linear(x) + fc2(act(fc1(x))): a feed-forward branch, most of whose hidden units have no activation and are one
    linear layer. Without fc1, act and fc2 none has."""

    def __init__(
        self,
        linear: nn.Module,
        fc1: nn.Module | None = None,
        act: nn.Module | None = None,
        fc2: nn.Module | None = None,
    ):
        super().__init__()
        self.linear, self.fc1, self.act, self.fc2 = linear, fc1, act, fc2

    def forward(self, x: Tensor) -> Tensor:
        result = self.linear(x)
        return result if self.fc1 is None else result + self.fc2(self.act(self.fc1(x)))


class MergedIdle(nn.Module):
    """A block whose feed-forward branch is a `PartlyIdle`. `block` is the code of the original one, `branch` where that
    lies in it."""

    def __init__(self, block: nn.Module, branch: str):
        super().__init__()
        self.block, self.branch, self.output = block, branch, nn.Identity()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # what the block returns
        output = self.block(x, *args, **kwargs)
        return with_first(output, self.output(first_of(output)))


class ChannelScale(nn.Module):
    """x * gamma, a value for each channel: of [..., C] with `shape` (-1,), of [N, C, H, W] with (-1, 1, 1)."""

    def __init__(self, gamma: Tensor, shape: tuple[int, ...]):
        super().__init__()
        self.gamma, self.shape = gamma, shape

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.reshape(self.shape)


class WithNones(nn.Module):
    """A merged block in the place of one that returns `count` values: its output, and None for the others."""

    def __init__(self, merged: nn.Module, count: int):
        super().__init__()
        self.merged, self.count = merged, count

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:  # masks are of no use
        return (self.merged(x), *[None] * (self.count - 1))


class Dropped(nn.Identity):
    """What is left of a block that was dropped. Takes what models hand to their blocks beside x (attention masks)."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x
