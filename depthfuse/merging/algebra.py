"""Exact weight algebra of block merging: fold, compose and add convolutions in float64.

Every linear piece of a block (conv, batch norm in eval mode, skip, average pool) becomes a `LinearConv`;
a block is merged by composing and adding them. The formulas are those of RepVGG (Ding et al., CVPR 2021, sec. 3.3)
and UPDP (arXiv 2401.06426, fig. 2), in the cross-correlation convention of torch.

`compose` assumes that no zero padding lies between the two convs, that is, that the first one is also evaluated outside
the image, over zeros. The pruned blocks of `depthfuse.merging.adapters` are trained under exactly that assumption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearConv:
    """A 2-d convolution as data: float64 weights and the geometry they are applied with.

    `padding` counts zeros on each side, per axis.
    """

    weight: Tensor  # [O, I / groups, kh, kw], float64
    bias: Tensor  # [O], float64
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to x [N, I, H, W] (float64) -> [N, O, H', W']."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> LinearConv:
        """Read an `nn.Conv2d`. Raises ValueError for padding that is not a fixed number of zeros."""
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"cannot merge a convolution with padding {conv.padding!r} in mode {conv.padding_mode!r}; "
                "only a fixed number of zeros on each side can be merged"
            )
        weight = conv.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
        return cls(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> LinearConv:
        """Read an `nn.Linear` as the 1x1 convolution that it is over a channels-last map."""
        weight = linear.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()
        return cls(weight[:, :, None, None], bias)

    @classmethod
    def identity(cls, channels: int, like: Tensor) -> LinearConv:
        """The skip connection: a 1x1 convolution with the identity matrix."""
        eye = torch.eye(channels, dtype=torch.float64, device=like.device)
        return cls(eye[:, :, None, None], eye.new_zeros(channels))

    @classmethod
    def average_pool(cls, channels: int, size: int, stride: int, like: Tensor) -> LinearConv:
        """A size x size average as a depthwise convolution without padding (windows reach over zeros)."""
        weight = torch.full((channels, 1, size, size), 1.0 / size**2, dtype=torch.float64, device=like.device)
        return cls(weight, weight.new_zeros(channels), stride=(stride, stride), groups=channels)

    def scaled(self, scale: Tensor, shift: Tensor | None = None) -> LinearConv:
        """Follow by y -> scale * y + shift, both [O]: a batch norm in eval mode, or a LayerScale."""
        bias = self.bias * scale
        return replace(
            self,
            weight=self.weight * scale[:, None, None, None],
            bias=bias if shift is None else bias + shift,
        )

    def centre_tap(self) -> LinearConv:
        """Keep only the centre tap of an odd kernel: the 1x1 convolution that samples the same places."""
        kh, kw = self.weight.shape[2:]
        if kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(f"a {kh}x{kw} kernel has no centre tap; expected odd sizes")
        reach = (kh // 2 * self.dilation[0], kw // 2 * self.dilation[1])
        padding = (self.padding[0] - reach[0], self.padding[1] - reach[1])
        if min(padding) < 0:
            raise ValueError(
                f"the centre tap of a {kh}x{kw} kernel with padding {self.padding} lies off the grid"
            )
        weight = self.weight[:, :, kh // 2 : kh // 2 + 1, kw // 2 : kw // 2 + 1]
        return replace(self, weight=weight, padding=padding, dilation=(1, 1))

    def ungrouped(self) -> LinearConv:
        """The same map with groups=1: the weight expanded block-diagonally."""
        if self.groups == 1:
            return self
        out_per_group, in_per_group = self.out_channels // self.groups, self.weight.shape[1]
        dense = self.weight.new_zeros(self.out_channels, self.in_channels, *self.weight.shape[2:])
        for g in range(self.groups):
            o, i = g * out_per_group, g * in_per_group
            dense[o : o + out_per_group, i : i + in_per_group] = self.weight[o : o + out_per_group]
        return replace(self, weight=dense, groups=1)

    def undilated(self) -> LinearConv:
        """The same map with dilation 1: zeros written between the taps."""
        if self.dilation == (1, 1):
            return self
        (dh, dw), (kh, kw) = self.dilation, self.weight.shape[2:]
        dense = self.weight.new_zeros(*self.weight.shape[:2], dh * (kh - 1) + 1, dw * (kw - 1) + 1)
        dense[:, :, ::dh, ::dw] = self.weight
        return replace(self, weight=dense, dilation=(1, 1))

    def to_conv(self, like: Tensor) -> nn.Conv2d:
        """An `nn.Conv2d` in the dtype and on the device of `like`; the single cast from float64."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            tuple(self.weight.shape[2:]),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            device="meta",
        )
        conv.weight = nn.Parameter(self.weight.to(like.device, like.dtype))
        conv.bias = nn.Parameter(self.bias.to(like.device, like.dtype))
        return conv

    def to_linear(self, like: Tensor) -> nn.Linear:
        """An `nn.Linear` from a 1x1 convolution without groups."""
        if self.weight.shape[2:] != (1, 1) or self.groups != 1:
            raise ValueError(
                f"a weight of shape {tuple(self.weight.shape)} with groups={self.groups} is no linear layer"
            )
        linear = nn.Linear(self.in_channels, self.out_channels, device="meta")
        linear.weight = nn.Parameter(self.weight[:, :, 0, 0].to(like.device, like.dtype))
        linear.bias = nn.Parameter(self.bias.to(like.device, like.dtype))
        return linear


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The affine map of a batch norm in eval mode: (scale, shift), each [C], float64.

    Raises ValueError for a norm that keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"{type(norm).__name__} keeps no running statistics; only a batch norm that does can be folded"
        )
    scale = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -scale * norm.running_mean.detach().double()
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def compose(second: LinearConv, first: LinearConv) -> LinearConv:
    """The single convolution x -> second(first(x)), with all padding moved to its input.

        W[o, i, u*s1*d2 + a*d1, v*s1*d2 + b*d1] += sum_m W2[o, m, u, v] W1[m, i, a, b]
        b = b2 + sum_m W2 b1,  stride s1*s2,  padding p1 + p2*s1

    Depthwise after anything keeps the groups of the first one; other pairs of groups are expanded to a dense kernel.
    Raises ValueError where the channel counts differ.
    """
    if second.in_channels != first.out_channels:
        raise ValueError(
            f"cannot compose: the first convolution gives {first.out_channels} channels, "
            f"the second takes {second.in_channels}"
        )
    if second.is_depthwise:  # scales the first one's rows, whatever its groups are
        groups = first.groups

        def product(tap: Tensor) -> Tensor:  # [O, 1] -> [O, I / groups, k1h, k1w]
            return tap[:, :, None, None] * first.weight

    elif first.is_depthwise and second.groups == 1:  # scales the second one's columns
        groups = 1

        def product(tap: Tensor) -> Tensor:  # [O, M] -> [O, I, k1h, k1w]
            return tap[:, :, None, None] * first.weight[None, :, 0]

    else:
        first, second, groups = first.ungrouped(), second.ungrouped(), 1

        def product(tap: Tensor) -> Tensor:  # [O, M] -> [O, I, k1h, k1w]
            return torch.einsum("om,miab->oiab", tap, first.weight)

    (k1h, k1w), (k2h, k2w) = first.weight.shape[2:], second.weight.shape[2:]
    (s1h, s1w), (d1h, d1w), (d2h, d2w) = first.stride, first.dilation, second.dilation
    step_h, step_w = s1h * d2h, s1w * d2w
    height = d1h * (k1h - 1) + 1 + (k2h - 1) * step_h
    width = d1w * (k1w - 1) + 1 + (k2w - 1) * step_w
    weight = first.weight.new_zeros(second.out_channels, first.in_channels // groups, height, width)
    for u in range(k2h):
        for v in range(k2w):
            rows = slice(u * step_h, u * step_h + d1h * (k1h - 1) + 1, d1h)
            cols = slice(v * step_w, v * step_w + d1w * (k1w - 1) + 1, d1w)
            weight[:, :, rows, cols] += product(second.weight[:, :, u, v])
    taps = second.weight.sum((2, 3))
    bias = second.bias + (taps[:, 0] * first.bias if second.is_depthwise else taps @ first.bias)
    padding = (first.padding[0] + second.padding[0] * s1h, first.padding[1] + second.padding[1] * s1w)
    stride = (s1h * second.stride[0], s1w * second.stride[1])
    return LinearConv(weight, bias, stride, padding, groups=groups)


def add(main: LinearConv, side: LinearConv) -> LinearConv:
    """The single convolution x -> main(x) + side(x): both kernels laid over one another, tap on tap.

    The result has the output size of `main`; where `side` is shorter at the far border, it reads zeros there.
    Raises ValueError where no symmetric padding gives that, or where channels or strides differ.
    """
    if (main.in_channels, main.out_channels, main.stride) != (
        side.in_channels,
        side.out_channels,
        side.stride,
    ):
        raise ValueError(
            f"cannot add a convolution {main.in_channels} -> {main.out_channels} with stride {main.stride} to one "
            f"{side.in_channels} -> {side.out_channels} with stride {side.stride}"
        )
    if main.groups != side.groups:
        main, side = main.ungrouped(), side.ungrouped()
    main, side = main.undilated(), side.undilated()
    size = []
    before = []
    for axis in (0, 1):
        (k_main, p_main), (k_side, p_side) = (
            (c.weight.shape[2 + axis], c.padding[axis]) for c in (main, side)
        )
        reach = max(p_main, p_side)
        size.append(reach + 1 + max(k_main - 1 - p_main, k_side - 1 - p_side))
        before.append(reach)
        if 2 * reach - size[axis] != 2 * p_main - k_main:
            raise ValueError(
                f"cannot add kernels of size {k_main} (padding {p_main}) and {k_side} (padding {p_side}): "
                "no symmetric padding keeps the output size"
            )
    weight = main.weight.new_zeros(*main.weight.shape[:2], *size)
    for conv in (main, side):
        top, left = before[0] - conv.padding[0], before[1] - conv.padding[1]
        kh, kw = conv.weight.shape[2:]
        weight[:, :, top : top + kh, left : left + kw] += conv.weight
    return LinearConv(weight, main.bias + side.bias, main.stride, (before[0], before[1]), groups=main.groups)
