"""Batch norms of a pruned net that give what those of the original gave.

Pruning changes what later layers read. Re-estimating batch norm statistics would bring it back to what the norms were
trained to give on training images; here they are brought back to what the original net gives on the images at hand. So
a net that was not pruned stays as it is, whatever the images are, and no trained scale is lost. After the bias
correction of quantisation (Nagel et al., ICCV 2019) and REPAIR (Jordan et al., ICLR 2023).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from depthfuse.merging.supernet import batch_norms

_DEAD = 1e-8  # a scale below this gives a constant, whatever it reads


@dataclass
class Moments:
    """Of a channel, over images and positions: [C] each."""

    mean: Tensor
    deviation: Tensor


@torch.no_grad()
def output_moments(net: nn.Module, batches: Iterable[Tensor]) -> dict[str, Moments]:
    """What each batch norm of `net`, in evaluation mode, gives (before an activation that is part of its module)."""
    inputs = _input_moments(net, batches)
    found = {}
    for name, norm in batch_norms(net):
        if name in inputs:
            scale, shift = _affine(norm)
            mean, deviation = inputs[name].mean, inputs[name].deviation
            found[name] = Moments(mean * scale + shift, deviation * scale.abs())
    return found


@torch.no_grad()
def match_moments(net: nn.Module, batches: Iterable[Tensor], wanted: Mapping[str, Moments]) -> None:
    """Set the statistics of the batch norms of `net`, in place, so that they give the moments `wanted`.

    Norms that are not run, or not named in `wanted`, keep theirs. In one pass: each norm of a batch reads what the ones
    before it give when matched on that batch.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = [
        norm.register_forward_pre_hook(functools.partial(_match_batch, seen, name, wanted[name]))
        for name, norm in batch_norms(net)
        if name in wanted
    ]
    try:
        for images in batches:
            net(images)
    finally:
        for handle in handles:
            handle.remove()
    norms = dict(batch_norms(net))
    for name, sums in seen.items():
        _set(norms[name], _moments(sums), wanted[name])


def _match_batch(
    seen: dict[str, list[Tensor]], name: str, wanted: Moments, norm: _BatchNorm, args: tuple[Any, ...]
) -> None:
    sums = _sums(args[0])
    seen[name] = [a + b for a, b in zip(seen[name], sums, strict=True)] if name in seen else sums
    _set(norm, _moments(sums), wanted)


def _sums(x: Tensor) -> list[Tensor]:
    """[count, sum, sum of squares] over all but the channels of x [N, C, ...] or rows [N, C], float64."""
    rows = x.double().movedim(1, -1).flatten(0, -2)
    return [rows.new_tensor(len(rows)), rows.sum(0), rows.square().sum(0)]


def _moments(sums: list[Tensor]) -> Moments:
    count, first, second = sums
    mean = first / count
    return Moments(mean, (second / count - mean.square()).clamp_min(0).sqrt())


def _input_moments(net: nn.Module, batches: Iterable[Tensor]) -> dict[str, Moments]:
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, _norm: nn.Module, args: tuple[Any, ...]) -> None:
        sums = _sums(args[0])
        seen[name] = [a + b for a, b in zip(seen[name], sums, strict=True)] if name in seen else sums

    handles = [
        norm.register_forward_pre_hook(functools.partial(keep, name)) for name, norm in batch_norms(net)
    ]
    try:
        for images in batches:
            net(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _moments(sums) for name, sums in seen.items()}


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a norm in evaluation mode, float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _set(norm: _BatchNorm, given: Moments, wanted: Moments) -> None:
    """gain (x - m) / s + bias has the wanted moments: s = |gain| given / wanted, and m after it."""
    gain = torch.ones_like(given.mean) if norm.weight is None else norm.weight.double()
    bias = torch.zeros_like(given.mean) if norm.bias is None else norm.bias.double()
    dead = (gain.abs() < _DEAD) | (given.deviation < _DEAD) | (wanted.deviation < _DEAD)
    one = torch.ones_like(gain)
    deviation = gain.abs() * given.deviation / torch.where(dead, one, wanted.deviation)
    deviation = deviation.clamp_min(norm.eps**0.5)  # a variance cannot be negative
    mean = given.mean - (wanted.mean - bias) * deviation / torch.where(dead, one, gain)
    norm.running_mean.copy_(torch.where(dead, norm.running_mean.double(), mean))
    norm.running_var.copy_(torch.where(dead, norm.running_var.double(), deviation.square() - norm.eps))
