"""Blocks that are a chain of conv + batch norm (+ activation) stages with a skip: ResNet's and MobileNet's.

Pruned, the inner activations are gone and the block is linear up to the add, so that one convolution can take its
place:

    conv norm [act | -] conv norm [act | -] ... (+) skip, [- | act norm]        [original | pruned]

Zero padding between two convolutions breaks that, because a merged convolution sees the first one's output there
and not zero. So the pruned block is trained with other borders (`method.md`'s R1 and R2):

- fill: the first convolution is 1x1, and the next one is padded: pad with what the first stage gives over zeros;
- shift: all padding moves to the first convolution, which then also computes the ring around the image;
- nothing to do where only the first convolution is padded.

While lambda falls from 1 to 0, fill and ring fade in with 1 - lambda, so that the ramp starts at the original block.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from depthfuse.errors import SpecError
from depthfuse.merging.adapters.base import (
    Candidate,
    Lambda,
    batch_norm_like,
    centre_tap,
    centre_tap_refusal,
    fixed,
    mix,
    new_batch_norm,
    own_activation,
    shrink,
)
from depthfuse.merging.algebra import LinearConv, add, compose, norm_affine
from depthfuse.merging.computed_weights import plain_type
from depthfuse.merging.merged_blocks import MergedConv


@dataclass(frozen=True)
class Stage:
    """conv -> norm -> act, where act may be part of timm's norm module; None after the last stage, and where there is
    none.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None
    act: nn.Module | None


@dataclass(frozen=True)
class Chain:
    """A block as its stages; holds references to the block's own modules."""

    stages: tuple[Stage, ...]
    shortcut: nn.Module | None  # nn.Identity, a downsample, or None: the block has no skip
    drop_path: nn.Module | None
    end_act: nn.Module | None  # what the original block applies after the add (ResNet's ReLU)
    new_act: nn.Module | None  # what the pruned block applies there if the original has nothing
    # What the original block applies before its first convolution (norm and activation of a pre-activation block); the
    # pruned one has nothing there: a norm before zero padding is no convolution.
    before: nn.Module | None = None
    shortcut_after_before: bool = False  # whether the shortcut reads what `before` gives, too


def stage_refusal(stage: Stage) -> str | None:
    """Why a stage cannot be part of a merge, or None."""
    conv, norm, act = stage.conv, stage.norm, stage.act
    if plain_type(conv) is not nn.Conv2d:
        return f"{plain_type(conv).__name__}: padding depends on the input size, or weights on the input"
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return f"convolution padding {conv.padding!r} ({conv.padding_mode})"
    if any(len(set(pair)) != 1 for pair in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)):
        return f"non-square convolution {conv.kernel_size}"
    if norm is not None and (
        plain_type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or norm.running_mean is None
    ):
        return f"{plain_type(norm).__name__} in place of a batch norm with running statistics"
    if act is not None and any(True for _ in act.parameters()):
        return f"{plain_type(act).__name__} has weights of its own"
    return None


def plain_norm(norm: nn.BatchNorm2d | None, z: Tensor) -> Tensor:
    """The batch norm alone, without the activation that timm's BatchNormAct2d adds."""
    return z if norm is None else nn.BatchNorm2d.forward(norm, z)


def norm_with_zero_value(
    norm: nn.BatchNorm2d | nn.Identity, conv_bias: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor]:
    """norm(z) for z = conv(x) [N, C, H, W], and the value [C] that the pair gives where x is zero.

    In training that value depends on the statistics of the batch, which torch gives back without a gradient: the
    gradient of the fill flows through the norm's weight and bias alone.
    """
    if isinstance(norm, nn.Identity):
        return z, z.new_zeros(z.shape[1]) if conv_bias is None else conv_bias
    if norm.training:
        momentum = norm.momentum
        norm.num_batches_tracked += 1
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
        y, mean, inv_std = torch.native_batch_norm(
            z, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, momentum, norm.eps
        )
    else:
        y = plain_norm(norm, z)
        mean, inv_std = norm.running_mean, torch.rsqrt(norm.running_var + norm.eps)
    zero = -mean * inv_std if conv_bias is None else (conv_bias - mean) * inv_std
    if norm.weight is not None:
        zero = zero * norm.weight + norm.bias
    return y, zero


def fade_ring(z: Tensor, margin: int, lam: Lambda) -> Tensor:
    """Scale the outer `margin` pixels of z [N, C, H, W] by 1 - lam."""
    ring = z.new_ones(1, 1, *z.shape[2:])
    ring[:, :, margin:-margin, margin:-margin] = 0.0
    return z * (1.0 - lam * ring)


class ConvChain(Candidate):
    """A chain of convolutions merged into one dense convolution: exact for every kernel, stride and group count."""

    name = "dense"

    @staticmethod
    @abstractmethod
    def read(block: nn.Module) -> Chain:
        """The block as a chain."""

    @classmethod
    def annealed(cls, chain: Chain) -> tuple[int, ...]:
        """The stages whose kernels shrink to 1x1 while lambda falls; they need no padding in the end."""
        return ()

    @classmethod
    def chain_refusal(cls, chain: Chain) -> str | None:
        """Why such a chain cannot be merged in this way, or None."""
        reasons = [stage_refusal(stage) for stage in chain.stages] + [shortcut_refusal(chain.shortcut)]
        reason = next((reason for reason in reasons if reason), None)
        return reason or overlay_refusal(chain, cls.annealed(chain))

    @staticmethod
    def tap(conv: nn.Conv2d) -> Tensor:
        """[O, I / groups, 1, 1]: what the kernel of an annealed stage shrinks to."""
        return centre_tap(conv)

    def __init__(self, block: nn.Module):
        super().__init__(block)
        chain = self.read(block)
        self.norms = nn.ModuleList(
            nn.Identity() if stage.norm is None else batch_norm_like(stage.norm) for stage in chain.stages
        )
        self.acts = nn.ModuleList(
            own_activation(s.act) if s.act is not None else nn.Identity() for s in chain.stages
        )
        self.tail_act = nn.Identity() if chain.new_act is None else own_activation(chain.new_act)
        last = chain.stages[-1].conv
        self.tail_norm = new_batch_norm(last.out_channels, last.weight)
        paddings = [stage.conv.padding[0] for stage in chain.stages]
        self.shrinking = self.annealed(chain)
        for i in self.shrinking:
            paddings[i] = 0
        first = chain.stages[0].conv
        self.fill = (
            first.kernel_size == (1, 1) and paddings[0] == 0 and paddings[1] > 0 and not any(paddings[2:])
        )
        self.shift = any(paddings[1:]) and not self.fill
        # margins[i]: how far the output of stage i must reach beyond the image for the padding of the later stages
        self.margins = [0] * len(paddings)
        for i in reversed(range(len(paddings) - 1)):
            self.margins[i] = paddings[i + 1] + self.margins[i + 1] * chain.stages[i + 1].conv.stride[0]

    def share_norms(self, block: nn.Module) -> None:
        for own, stage in zip(self.norms, self.read(block).stages, strict=True):
            if stage.norm is None:
                continue
            if not isinstance(stage.norm.weight, nn.Parameter | None):
                raise SpecError(
                    "a batch norm computes its weight from other tensors, and such a weight cannot be shared: pass "
                    "separate_norms=True, or make it a plain parameter first (prune.remove, remove_parametrizations)"
                )
            own.weight, own.bias = stage.norm.weight, stage.norm.bias

    def drop_border_remedy(self) -> None:
        self.fill = self.shift = False

    def _conv(self, i: int, conv: nn.Conv2d, x: Tensor, lam: Lambda, fill: Tensor | None) -> Tensor:
        weight, bias, padding = conv.weight, conv.bias, conv.padding
        if i in self.shrinking:
            if fixed(lam, 0.0):
                weight, padding = self.tap(conv), (0, 0)
            else:
                weight = shrink(lam, weight, self.tap(conv))
        if self.shift and i == 0:
            padding = (padding[0] + self.margins[0] * conv.stride[0],) * 2
        elif self.shift and i not in self.shrinking:
            padding = (0, 0)
        if fill is not None:
            # conv over a map padded with `fill` = conv over (map - fill) padded with zeros, plus a constant
            x = x - fill[:, None, None]
            taps = weight.sum((2, 3), keepdim=True)
            constant = F.conv2d(fill[None, :, None, None].to(x.dtype), taps, groups=conv.groups).flatten()
            bias = constant if bias is None else bias + constant
        return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)

    def forward(self, block: nn.Module, x: Tensor, lam: Lambda) -> Tensor:  # [N, C, H, W] -> [N, K, H', W']
        chain = self.read(block)
        if chain.before is not None:
            given = x if fixed(lam, 0.0) else mix(lam, chain.before(x), x)
        else:
            given = x
        z, fill = given, None
        for i, stage in enumerate(chain.stages):
            z = self._conv(i, stage.conv, z, lam, fill)
            fill = None
            if self.fill and i == 0:
                own, fill = norm_with_zero_value(self.norms[i], stage.conv.bias, z)
                fill = fill * (1.0 - lam)
            else:
                own = self.norms[i](z)
            if fixed(lam, 0.0):
                z = own
                continue
            z = mix(lam, plain_norm(stage.norm, z), own)
            if stage.act is not None:
                z = mix(lam, self.acts[i](z), z)
            if self.shift and self.margins[i]:
                z = fade_ring(z, self.margins[i], lam)
        if chain.drop_path is not None:
            z = chain.drop_path(z)
        if chain.shortcut is not None:
            z = z + shortcut_forward(chain.shortcut, given if chain.shortcut_after_before else x, lam)
        if chain.end_act is not None:
            z = chain.end_act(z)
        pruned = self.tail_norm(self.tail_act(z))
        return pruned if fixed(lam, 0.0) else mix(lam, z, pruned)

    def merge(self, block: nn.Module) -> MergedConv:
        chain = self.read(block)
        convs = []
        for i, (stage, norm) in enumerate(zip(chain.stages, self.norms, strict=True)):
            conv = LinearConv.from_conv(stage.conv)
            affine = (conv.bias.new_ones(conv.out_channels),) if stage.norm is None else norm_affine(norm)
            if i in self.shrinking:
                tap = self.tap(stage.conv).detach().double()
                conv = replace(conv, weight=tap, padding=(0, 0), dilation=(1, 1))
            convs.append(conv.scaled(*affine))
        merged = convs[0]
        for conv in convs[1:]:
            merged = compose(conv, merged)
        like = chain.stages[0].conv.weight
        if chain.shortcut is not None:
            merged = add(merged, read_shortcut(chain.shortcut, like, merged.in_channels))
        act = self.tail_act if chain.end_act is None else chain.end_act
        return MergedConv(merged.to_conv(like), copy.deepcopy(act), copy.deepcopy(self.tail_norm))


class Compact(ConvChain):
    """Every convolution larger than 1x1 is annealed to its centre tap, W * (lam + (1 - lam) * centre mask).

    The pruned block is then a chain of 1x1 convolutions, strides kept, and merges to one 1x1. Nothing is padded any
    more, so its borders need no remedy; on the way there the taps that read zeros fade.
    """

    name = "compact"

    @classmethod
    def annealed(cls, chain: Chain) -> tuple[int, ...]:
        return tuple(i for i, stage in enumerate(chain.stages) if stage.conv.kernel_size != (1, 1))

    @classmethod
    def chain_refusal(cls, chain: Chain) -> str | None:
        reason = super().chain_refusal(chain)
        if reason:  # a layer may be no convolution at all
            return reason
        reasons = [centre_tap_refusal(chain.stages[i].conv) for i in cls.annealed(chain)]
        return next((reason for reason in reasons if reason), None)


class LastCompact(Compact):
    """Of two convolutions larger than 1x1 only the last is annealed: two 3x3 become one 3x3.

    UPDP's FLOPs for ResNet-34 fit one saved 3x3 a block; two 3x3 merged exactly make a 5x5, which is slower than
    both. With a 1x1 in second place the block needs no change at its borders either.
    """

    @classmethod
    def annealed(cls, chain: Chain) -> tuple[int, ...]:
        return (len(chain.stages) - 1,)


class LastIdentity(LastCompact):
    """The last convolution is annealed to the identity, lam * W + (1 - lam) * delta."""

    name = "identity"

    @staticmethod
    def tap(conv: nn.Conv2d) -> Tensor:
        eye = torch.eye(conv.out_channels, dtype=conv.weight.dtype, device=conv.weight.device)
        return eye[:, :, None, None]

    @classmethod
    def chain_refusal(cls, chain: Chain) -> str | None:
        reason = super().chain_refusal(chain)
        if reason:
            return reason
        conv = chain.stages[-1].conv
        if conv.in_channels != conv.out_channels or conv.stride != (1, 1) or conv.groups != 1:
            return "the second convolution has a stride, groups or other channels out than in: no identity"
        return None

    def _conv(self, i: int, conv: nn.Conv2d, x: Tensor, lam: Lambda, fill: Tensor | None) -> Tensor:
        if i in self.shrinking and fixed(lam, 0.0):
            return x if conv.bias is None else x + conv.bias[:, None, None]
        return super()._conv(i, conv, x, lam, fill)


class Subsample(nn.Module):
    """A shortcut without weights: every `stride`-th pixel, with channels of zeros before and after (option A of He et
    al., CVPR 2016, for CIFAR).
    """

    def __init__(self, stride: tuple[int, int], before: int, after: int):
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, before + C + after, H', W']
        return F.pad(x[:, :, :: self.stride[0], :: self.stride[1]], (0, 0, 0, 0, self.before, self.after))

    def as_conv(self, channels: int, like: Tensor) -> LinearConv:
        eye = torch.eye(channels, dtype=torch.float64, device=like.device)
        weight = F.pad(eye, (0, 0, self.before, self.after))
        return LinearConv(weight[:, :, None, None], weight.new_zeros(len(weight)), stride=self.stride)


def shortcut_refusal(shortcut: nn.Module | None) -> str | None:
    """Why a shortcut is not linear, or None. Known: identity, conv + norm, average pool + conv + norm, Subsample."""
    if shortcut is None or plain_type(shortcut) in (nn.Identity, Subsample):
        return None
    if not isinstance(shortcut, nn.Sequential) or len(shortcut) not in (2, 3):
        return f"unknown shortcut {plain_type(shortcut).__name__}"
    *pool, conv, norm = shortcut
    for layer in pool:
        if plain_type(layer) is nn.AvgPool2d:
            sizes = {*_pair(layer.kernel_size), *_pair(layer.stride)}
            if len(sizes) > 1 or _pair(layer.padding) != (0, 0):
                return "overlapping average pool in the shortcut"
        elif plain_type(layer) is not nn.Identity:
            return f"{plain_type(layer).__name__} in the shortcut"
    return stage_refusal(Stage(conv, None if plain_type(norm) is nn.Identity else norm, None))


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def overlay_refusal(chain: Chain, annealed: tuple[int, ...]) -> str | None:
    """Why a merged chain and its shortcut cannot be one kernel, or None; see `algebra.add`."""
    if chain.shortcut is None:
        return None
    size, padding, stride = 1, 0, 1  # of the merged kernel: all are square
    for i, stage in enumerate(chain.stages):
        conv = stage.conv
        if i not in annealed:
            size += (conv.kernel_size[0] - 1) * conv.dilation[0] * stride
            padding += conv.padding[0] * stride
        stride *= conv.stride[0]
    side_size, side_padding, side_stride = 1, 0, 1
    if isinstance(chain.shortcut, Subsample):
        side_stride = chain.shortcut.stride[0] if len(set(chain.shortcut.stride)) == 1 else 0
    elif isinstance(chain.shortcut, nn.Sequential):
        *pool, conv, _ = chain.shortcut
        if pool and isinstance(pool[0], nn.AvgPool2d):
            side_size = side_stride = _pair(pool[0].kernel_size)[0]
        side_size += (conv.kernel_size[0] - 1) * conv.dilation[0] * side_stride
        side_padding = conv.padding[0] * side_stride
        side_stride *= conv.stride[0]
    if stride != side_stride:
        return f"the branch has a stride of {stride}, the shortcut one of {side_stride}"
    reach = max(padding, side_padding)
    whole = reach + 1 + max(size - 1 - padding, side_size - 1 - side_padding)
    if 2 * reach - whole != 2 * padding - size:
        return f"the shortcut reads {side_size} pixels where the merged kernel of size {size} has no place for them"
    return None


def shortcut_forward(shortcut: nn.Module, x: Tensor, lam: Lambda) -> Tensor:
    """The shortcut of a block at lam.

    Odd sizes: timm's pool averages the cut windows at the far border over what is left of them, which no convolution
    does; the pruned block averages them with zeros.
    """
    if isinstance(shortcut, nn.Sequential) and isinstance(shortcut[0], nn.AvgPool2d):
        size = _pair(shortcut[0].kernel_size)[0]
        cut = (0, -x.shape[-1] % size, 0, -x.shape[-2] % size)
        pooled = F.avg_pool2d(F.pad(x, cut), size)
        if any(cut) and not fixed(lam, 0.0):
            pooled = mix(lam, shortcut[0](x), pooled)
        return shortcut[1:](pooled)
    return shortcut(x)


def read_shortcut(shortcut: nn.Module, like: Tensor, channels: int) -> LinearConv:
    """A shortcut as one convolution."""
    if isinstance(shortcut, Subsample):
        return shortcut.as_conv(channels, like)
    if not isinstance(shortcut, nn.Sequential):
        return LinearConv.identity(channels, like)
    *pool, conv, norm = shortcut
    side = LinearConv.from_conv(conv)
    if not isinstance(norm, nn.Identity):
        side = side.scaled(*norm_affine(norm))
    if pool and isinstance(pool[0], nn.AvgPool2d):
        size = _pair(pool[0].kernel_size)[0]
        side = compose(side, LinearConv.average_pool(conv.in_channels, size, size, like))
    return side
