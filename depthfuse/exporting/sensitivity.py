"""How much a net's outputs suffer when one layer alone is rounded to 8 bits: which layers to spare first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from depthfuse.acceleration.planning.part import as_tuple
from depthfuse.fused.layers import FusedConv2d, FusedLinear

Layer = FusedConv2d | FusedLinear
_LEAST_SCALE = torch.finfo(torch.float32).tiny


def layers_of(plan: fx.GraphModule) -> dict[str, Layer]:
    """{path in the plan: convolution or linear layer}."""
    return {name: m for name, m in plan.named_modules() if isinstance(m, FusedConv2d | FusedLinear)}


@torch.no_grad()
def sensitivities(plan: fx.GraphModule, images: Tensor) -> dict[str, float]:
    """The squared error of the net's outputs over their squares, with each layer in turn in 8 bits.

    Rounded is as runtimes do: weights symmetrically, with a scale for each output channel; what the layer reads with
    one scale and zero point, from the least to the largest value that it has on these images.

    Args:
        plan: of one input, in float32. images: [N, C, H, W].

    Returns:
        {layer's path in the plan: error}, the largest first; a net whose outputs are all zero has none, 0.
    """
    exact = as_tuple(plan(images))
    errors = {}
    for name, layer in layers_of(plan).items():
        with _in_8_bits(layer):
            errors[name] = _relative_square(as_tuple(plan(images)), exact)
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


@contextmanager
def _in_8_bits(layer: Layer) -> Iterator[None]:
    weight = layer.weight.detach().clone()
    hook = layer.register_forward_pre_hook(lambda module, args: (_rounded(args[0]), *args[1:]))
    try:
        layer.weight.copy_(_rounded_by_channel(weight))
        yield
    finally:
        hook.remove()
        layer.weight.copy_(weight)


def _rounded(x: Tensor) -> Tensor:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / 255, _LEAST_SCALE)
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)


def _rounded_by_channel(weight: Tensor) -> Tensor:
    scale = (weight.flatten(1).abs().amax(1) / 127).clamp_min(_LEAST_SCALE)
    return torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros_like(scale, dtype=torch.int32), 0, -127, 127
    )


def _relative_square(given: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Over all outputs that are floating-point; infinite where one is no number."""
    pairs = [(g.double(), e.double()) for g, e in zip(given, exact, strict=True) if e.is_floating_point()]
    off = sum(float((g - e).square().sum()) for g, e in pairs)
    whole = sum(float(e.square().sum()) for _, e in pairs)
    if math.isnan(off):
        return math.inf
    return off / whole if whole else 0.0
