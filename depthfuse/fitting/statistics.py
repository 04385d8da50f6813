"""Batch norms of a pruned net that give what those of the original gave.

Pruning changes what later layers read. Re-estimating batch norm statistics would bring it back to what the norms were
trained to give on training images; here they are brought back to what the original net gives on the images at hand. So
a net that was not pruned stays as it is, whatever the images are, and no trained scale is lost. After the bias
correction of quantisation (Nagel et al., ICCV 2019) and REPAIR (Jordan et al., ICLR 2023).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from depthfuse.merging.merged_blocks import TokenBatchNorm
from depthfuse.merging.supernet import batch_norms

_POSITIONS = 256  # of an image that count
_DEAD = 1e-8  # a scale below this gives a constant, whatever it reads


@dataclass
class Moments:
    """Of each channel over images and positions: mean [C], deviation [C], float64; `count` of both."""

    count: int
    mean: Tensor
    deviation: Tensor


BatchMoments = list[dict[str, Moments]]  # for each batch of images: {name of a batch norm: moments}


@torch.no_grad()
def output_moments(net: nn.Module, batches: Sequence[Tensor]) -> BatchMoments:
    """What each batch norm of `net`, in evaluation mode, gives (before an activation that is part of its module)."""
    found: BatchMoments = []
    norms = dict(batch_norms(net))

    def keep(name: str, norm: _BatchNorm, args: tuple[Any, ...]) -> None:
        given = _moments(norm, args[0])
        scale, shift = _affine(norm)
        found[-1][name] = Moments(given.count, given.mean * scale + shift, given.deviation * scale.abs())

    _run_hooked(
        net, batches, {name: functools.partial(keep, name) for name in norms}, lambda: found.append({})
    )
    return found


@torch.no_grad()
def match_moments(net: nn.Module, batches: Sequence[Tensor], wanted: BatchMoments) -> None:
    """Set the statistics of the batch norms of `net`, in place, so that they give the moments `wanted` of these
    batches.

    Norms that are not run, or not named in `wanted`, keep theirs. In one pass: each norm of a batch reads what the ones
    before it give when matched on that batch.
    """
    norms = dict(batch_norms(net))
    names = [name for name in norms if any(name in batch for batch in wanted)]
    found: BatchMoments = []

    def match(name: str, norm: _BatchNorm, args: tuple[Any, ...]) -> None:
        given = _moments(norm, args[0])
        found[-1][name] = given
        _set(norm, given, wanted[len(found) - 1][name])

    _run_hooked(
        net, batches, {name: functools.partial(match, name) for name in names}, lambda: found.append({})
    )
    for name in names:
        if name in found[0]:
            given, aim = (_pooled([batch[name] for batch in all_of]) for all_of in (found, wanted))
            _set(norms[name], given, aim)


def _run_hooked(
    net: nn.Module,
    batches: Sequence[Tensor],
    hooks: Mapping[str, Callable[..., None]],
    before_batch: Callable[[], object],
) -> None:
    handles = [net.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        for images in batches:
            before_batch()
            net(images)
    finally:
        for handle in handles:
            handle.remove()


def _moments(norm: _BatchNorm, x: Tensor) -> Moments:
    """Over all but the channels of x [N, C, ...], or tokens [..., C]; of large maps, every so-manieth pixel."""
    if isinstance(norm, TokenBatchNorm):
        x = x.reshape(-1, x.shape[-1])
    if x.ndim == 4:
        step = math.ceil(math.sqrt(x.shape[2] * x.shape[3] / _POSITIONS))
        x = x[:, :, ::step, ::step]
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
    return Moments(x.numel() // x.shape[1], mean.double(), variance.double().sqrt())


def _pooled(parts: Sequence[Moments]) -> Moments:
    count = sum(part.count for part in parts)
    mean = sum(part.mean * (part.count / count) for part in parts)
    square = sum((part.deviation.square() + part.mean.square()) * (part.count / count) for part in parts)
    return Moments(count, mean, (square - mean.square()).clamp_min(0).sqrt())


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
