"""Fit one merged block, layer -> activation -> batch norm, to what the original block gives.

Without training a new activation after the layer does harm only, and so it starts where it is linear: the layer gives
the block's outputs shifted (and for a bounded activation scaled) into that range, and the batch norm undoes it. Where
the original block ends in the same activation, the layer is fitted to what that one reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.errors import FitError
from depthfuse.fitting.layers import (
    LARGEST_FEATURES,
    Layer,
    along,
    channels_last,
    features_of,
    hooked,
    set_weight,
    sums_of,
)
from depthfuse.fitting.least_squares import Sums, fit_linear
from depthfuse.fitting.recording import Call
from depthfuse.merging.merged_blocks import (
    MergedConv,
    MergedFactorised,
    MergedFeedForward,
    MergedIdle,
    MergedLinear,
    MergedTransformerBlock,
    WithNones,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tail:
    """The parts of a merged block: y = norm(act(rest + gamma * layer(a))); `act` may be nn.Identity, `norm` None."""

    layer: Layer
    act: nn.Module
    norm: nn.Module | None


def tail_of(merged: nn.Module) -> Tail | None:
    """None where a merged block has no layer of its own (blocks that are dropped, or lose their attention only)."""
    if isinstance(merged, WithNones):
        return tail_of(merged.merged)
    if isinstance(merged, MergedConv):
        return Tail(merged.conv, merged.act, merged.norm)
    if isinstance(merged, MergedFactorised):
        return Tail(merged.pointwise, merged.act, merged.norm)
    if isinstance(merged, MergedTransformerBlock | MergedLinear):
        return Tail(merged.fc, merged.act, merged.norm)
    if isinstance(merged, MergedFeedForward):
        return Tail(merged.block.get_submodule(merged.layer), merged.act, merged.norm)
    if isinstance(merged, MergedIdle):
        return Tail(merged.block.get_submodule(merged.branch).linear, merged.output, None)
    return None


def can_be_fitted(merged: nn.Module) -> bool:
    """Whether a merged block has a layer of its own that is not too large."""
    tail = tail_of(merged)
    return tail is not None and features_of(tail.layer) <= LARGEST_FEATURES


@torch.no_grad()
def fit_block(
    merged: nn.Module, given: Sequence[Call], wanted: Sequence[Call], seed: int = 0
) -> float | None:
    """Fit a merged block, in place, by least squares in float64 (`least_squares.py`).

    Args:
        merged: in evaluation mode.
        given: the calls whose arguments it is to be fitted on: of the net pruned so far.
        wanted: the calls whose outputs it shall give, for the same images: of the original net.
        seed: of the choice of positions, where images have more than are needed.

    Returns the share of the outputs' variance that is left as error, or None where the block has nothing to fit.
    Raises FitError for numbers that are not finite, and for a layer of more than `LARGEST_FEATURES` inputs an output.
    """
    tail = tail_of(merged)
    if tail is None:
        return None
    if features_of(tail.layer) > LARGEST_FEATURES:
        raise FitError(
            f"a layer of {features_of(tail.layer)} inputs for each output is too large to be fitted; the most are "
            f"{LARGEST_FEATURES}"
        )
    if len(given) < 2:
        raise FitError("fitting takes two batches of images at least: one is held out to choose the ridge")
    axis = -1 if isinstance(tail.layer, nn.Linear) else 1
    targets, scale = _targets(tail.act, wanted, axis, alone=_stands_alone(merged, tail, given[0]))
    gamma = _gamma(merged, tail, given[0], axis)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for call, target in zip(given, targets, strict=True):
            read, rest = _run_without(merged, tail, call)
            yield read, (target - rest) / along(gamma, axis, target.ndim)

    fitted, held_out = sums_of(tail.layer, pairs(), len(given), axis, seed)
    weight, bias, ridge = _best_fit(tail.layer, scale, fitted, held_out)
    set_weight(tail.layer, weight)
    if tail.layer.bias is None:
        raise FitError("its layer has no bias")
    tail.layer.bias.copy_(bias.flatten())
    left = _set_norm(merged, tail, given, wanted, axis)
    log.debug("fitted %s: ridge %g, %.3f of the variance left", type(merged).__name__, ridge, left)
    return left


def _best_fit(layer: Layer, scale: Tensor, fitted: Sums, held_out: Sums) -> tuple[Tensor, Tensor, float]:
    """With the prior that errs least: where data says little, a block is dropped, or stays as it was merged."""
    infinite = float("inf")
    priors = _priors(layer, scale, fitted)
    return fit_linear(fitted, held_out, min(priors, key=lambda p: held_out.error(*fitted.solve(infinite, p))))


def _priors(layer: Layer, scale: Tensor, sums: Sums) -> list[Tensor]:
    """[G, F, O] each: nothing; the layer as it is; each input to its output, scaled by what is seen of the two."""
    nothing = torch.zeros_like(sums.in_out)
    groups, wide, high = nothing.shape
    as_merged = (layer.weight.flatten(1).double() * scale[:, None]).reshape(groups, high, wide).movedim(1, 2)
    taps = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
    if wide != high * taps or taps % 2 == 0:
        return [nothing, as_merged]
    here = torch.arange(high)
    at = here * taps + taps // 2  # the middle of the window
    variance = sums.in_in[:, at, at] - sums.first_in[:, at].square() / sums.rows
    joint = sums.in_out[:, at, here] - sums.first_in[:, at] * sums.first_out / sums.rows
    identity = nothing.clone()
    identity[:, at, here] = torch.where(variance > 0, joint / variance.clamp_min(1e-300), 0.0)
    return [nothing, as_merged, identity]


def _linear_range(act: nn.Module) -> tuple[float, float]:
    """(low, high): where act(z) is z; high is infinite where it has no upper end, and low where it is everywhere so.
    (0, 0) where it is nowhere.
    """
    z = torch.arange(-8.0, 64.01, 0.25, dtype=torch.float64)
    good = ((act(z.clone()) - z).abs() <= 1e-9 * z.abs().clamp_min(1.0)).tolist()
    best = start = 0
    length = 0
    for i in range(len(good) + 1):
        if i == len(good) or not good[i]:
            if i - start > length:
                best, length = start, i - start
            start = i + 1
    if length < 2:
        return 0.0, 0.0
    high = float(z[best + length - 1])
    if length == len(good):
        return -float("inf"), float("inf")
    return float(z[best]), float("inf") if high == float(z[-1]) else high


def _targets(act: nn.Module, wanted: Sequence[Call], axis: int, alone: bool) -> tuple[list[Tensor], Tensor]:
    """What shall stand before the activation, and what the block's outputs were scaled by for that: [C].

    alone: nothing is added to the layer's output, so that it may be scaled.
    """
    dims = wanted[0].output.ndim
    others = [d for d in range(dims) if d != axis % dims]
    least = torch.stack([call.output.double().amin(others) for call in wanted]).amin(0)
    most = torch.stack([call.output.double().amax(others) for call in wanted]).amax(0)
    scale = torch.ones_like(least)
    if all(call.before_act is not None for call in wanted):
        return [call.before_act for call in wanted], scale
    low, high = _linear_range(act)
    if high <= low or low == -float("inf"):
        return [call.output for call in wanted], scale
    spread = (most - least).clamp_min(1e-12)
    least, spread = least - 0.1 * spread, 1.2 * spread  # some room for images that were not seen
    if alone and high == float("inf"):
        rows = torch.cat([channels_last(call.output, axis).double() for call in wanted])
        scale = 1.0 / rows.std(0).clamp_min(1e-12)
    elif alone:
        scale = (high - low) / spread
    shift = low - least * scale
    scale_along, shift_along = along(scale, axis, dims), along(shift, axis, dims)
    return [call.output.double() * scale_along + shift_along for call in wanted], scale


def _run_without(merged: nn.Module, tail: Tail, call: Call) -> tuple[Tensor, Tensor]:
    """(what the layer reads, what stands before the activation without it)."""
    return _run(merged, tail, call, torch.zeros_like)


def _run(
    merged: nn.Module, tail: Tail, call: Call, instead: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    seen: dict[str, Tensor] = {}

    def after_layer(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        seen["read"] = args[0]
        return None if instead is None else instead(output)

    def before_act(_act: nn.Module, args: tuple[Any, ...]) -> None:
        seen["z"] = args[0].clone()

    with hooked(
        tail.layer.register_forward_hook(after_layer), tail.act.register_forward_pre_hook(before_act)
    ):
        # a copy, as activations may work in place
        merged(*(a.clone() if isinstance(a, Tensor) else a for a in call.args), **call.kwargs)
    return seen["read"], seen["z"]


def _stands_alone(merged: nn.Module, tail: Tail, call: Call) -> bool:
    return not bool(_run_without(merged, tail, call)[1].any())


def _gamma(merged: nn.Module, tail: Tail, call: Call, axis: int) -> Tensor:
    """[C]: what the layer's output is scaled by before it is added; 1 where it is too small to divide by.

    Raises FitError where the layer does not lie before the activation, channel by channel.
    """
    given = _run(merged, tail, call, torch.ones_like)[1] - _run_without(merged, tail, call)[1]
    rows = channels_last(given.double(), axis)
    gamma = rows.mean(0)
    if not bool(((rows - gamma).abs() <= 1e-3 * gamma.abs().clamp_min(1e-6)).all()):
        raise FitError("more than a scale lies between its layer and its activation")
    return torch.where(gamma.abs() < 1e-12, torch.ones_like(gamma), gamma)


def _set_norm(
    merged: nn.Module, tail: Tail, given: Sequence[Call], wanted: Sequence[Call], axis: int
) -> float:
    """Statistics and affine of the batch norm, where there is one; the share of the variance that is left."""
    before: list[Tensor] = []

    def keep(_norm: nn.Module, args: tuple[Any, ...]) -> None:
        before.append(channels_last(args[0], axis).double())

    last = tail.act if tail.norm is None else tail.norm
    with hooked(last.register_forward_pre_hook(keep)):
        for call in given:
            merged(*(a.clone() if isinstance(a, Tensor) else a for a in call.args), **call.kwargs)
    s, y = torch.cat(before), torch.cat([channels_last(call.output, axis).double() for call in wanted])
    mean_s, mean_y = s.mean(0), y.mean(0)
    var_s, var_y = s.var(0, unbiased=False), y.var(0, unbiased=False)
    all_y = var_y.sum().clamp_min(1e-300)
    if tail.norm is None:
        return float((s - y).square().mean(0).sum() / all_y)
    joint = ((s - mean_s) * (y - mean_y)).mean(0)
    slope = torch.where(var_s > 0, joint / var_s.clamp_min(1e-300), 0.0)
    norm = tail.norm
    norm.running_mean.copy_(mean_s)
    norm.running_var.copy_(var_s)
    norm.weight.copy_(slope * (var_s + norm.eps).sqrt())
    norm.bias.copy_(mean_y)
    return float((var_y - slope.square() * var_s).clamp_min(0).sum() / all_y)
