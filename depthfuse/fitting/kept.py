"""Fit the last layer of a block that is kept: it reads what the pruned net gives, and shall give what it gave before.

What pruned blocks get wrong goes on through the shortcuts, and a kept block adds what it makes of wrong inputs. Its
last layer, fitted by ridge regression with its own weights as the prior, takes back what it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from depthfuse.fitting.layers import (
    Layer,
    along,
    channels_last,
    features_of,
    hooked,
    reads_rows,
    set_weight,
    sums_of,
    weight_of,
)
from depthfuse.fitting.least_squares import fit_linear
from depthfuse.fitting.recording import Call, record
from depthfuse.fitting.statistics import match_moments, output_moments

LARGEST_FEATURES = (
    1536  # some seconds each; of kept blocks there are many, and a 3x3 over 512 channels takes a minute
)
_LEAST_SCALE = 1e-6  # what is scaled by less is lost
_MOST_GROWTH = 10.0  # of what a channel gives
_ROUNDING = 1e-4  # of float32, through a block


@torch.no_grad()
def fit_kept(block: nn.Module, given: Sequence[Call], wanted: Sequence[Call]) -> bool:
    """Fit the last layer of a block, in place, by least squares in float64 (`least_squares.py`).

    Args:
        block: in evaluation mode.
        given: the calls whose arguments it is to be fitted on: of the net pruned so far.
        wanted: the calls whose outputs it shall give, for the same images: of the original net.

    Returns whether it was fitted: not where no layer lies before the block's end, or before its last activation, with
    no more than a scale of each channel after it and `LARGEST_FEATURES` inputs an output at most, or where nothing
    could take up the layer's bias. Raises FitError for numbers that are not finite.
    """
    replay = Replay(block)
    for layer in reversed(_layers(replay, given[0])):
        found = _scale(replay, layer, given[0])
        after = _norm_after(replay, layer, given[0]) if layer.bias is None else None
        if found is None or (layer.bias is None and after is None):
            continue
        gamma, axis = found
        pairs = _pairs(replay, layer, gamma, axis, given, wanted)
        fitted, held_out = sums_of(layer, pairs, len(given), axis)
        weight, bias, _ridge = fit_linear(fitted, held_out, weight_of(layer))
        _take(layer, after, weight, bias.flatten(), replay.run(given[0], layer, None)[0])
        return True
    return False


def _take(layer: Layer, norm: _BatchNorm | None, weight: Tensor, bias: Tensor, read: Tensor) -> None:
    """Set weight [G, F, O] and bias [C] of a layer, or of the norm after it, but for channels that would give much
    more than before on what it reads: such as count for next to nothing at the block's end, and would overflow in
    float16 to count for something."""

    def given() -> Tensor:
        return channels_last(layer(read), _axis(layer)).double()

    held = layer.bias if norm is None else norm.running_mean
    old_weight, old_held, before = layer.weight.clone(), held.clone(), given().norm(dim=0)
    set_weight(layer, weight)
    if norm is None:
        held.copy_(bias)
        now = given()
    else:  # norm(z + b) has b taken off its mean
        held.sub_(bias)
        now = given() + bias
    grown = now.norm(dim=0) > _MOST_GROWTH * before
    layer.weight[grown], held[grown] = old_weight[grown], old_held[grown]


def settle_kept(block: nn.Module, original: nn.Module, given: Sequence[Call], wanted: Sequence[Call]) -> None:
    """Let the batch norms of a block, in place, give what the original's give; see `fit_kept`, `match_moments`."""
    match_moments(Replay(block), given, output_moments(Replay(original), wanted))


def _pairs(
    replay: Replay, layer: Layer, gamma: Tensor, axis: int, given: Sequence[Call], wanted: Sequence[Call]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the layer reads, and what it would have to give for the block to give what is wanted."""
    for call, aim in zip(given, wanted, strict=True):
        read, rest = replay.run(call, layer, torch.zeros_like)
        yield read, (_end(aim).double() - rest.double()) / along(gamma, axis, rest.ndim)


class Replay(nn.Module):
    """A block as a net of its own, which runs it on the inputs of a call."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, call: Call) -> Any:
        return self.block(*(a.clone() if isinstance(a, Tensor) else a for a in call.args), **call.kwargs)

    def run(
        self, call: Call, layer: Layer, instead: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """(what a layer reads, the end of the block) with `instead` of what the layer gives."""
        seen: list[Tensor] = []

        def after_layer(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            seen.append(args[0].clone())
            return None if instead is None else instead(output)

        with hooked(layer.register_forward_hook(after_layer)):
            (again,) = record(self, "block", [call])
        return seen[0], _end(again)


def _end(call: Call) -> Tensor:
    """What a block gives, before the activation that it ends in, if it does."""
    return call.output if call.before_act is None else call.before_act


def _layers(replay: Replay, call: Call) -> list[Layer]:
    """The layers that are run once, in their order, and are regressions of what they read."""
    runs: list[tuple[Layer, bool]] = []

    def keep(layer: Layer, args: tuple[Any, ...], output: Tensor) -> None:
        runs.append((layer, features_of(layer) <= LARGEST_FEATURES and reads_rows(layer, args[0], output)))

    layers = [module for module in replay.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with hooked(*(layer.register_forward_hook(keep) for layer in layers)):
        replay(call)
    ran = [layer for layer, _ in runs]
    return [layer for layer, good in runs if good and ran.count(layer) == 1]


def _scale(replay: Replay, layer: Layer, call: Call) -> tuple[Tensor, int] | None:
    """(what the layer's output is scaled by at the block's end [C], the axis of the channels there); None where more
    than that happens to it."""
    outputs: list[Tensor] = []
    with hooked(layer.register_forward_hook(lambda _layer, _args, output: outputs.append(output.clone()))):
        end = replay.run(call, layer, None)[1].double()
    zero, one = (
        replay.run(call, layer, instead)[1].double() for instead in (torch.zeros_like, torch.ones_like)
    )
    given = channels_last(outputs[0], _axis(layer)).double()
    for axis in (1, -1):
        if end.shape[axis] != given.shape[1] or end.numel() != given.numel():
            continue
        rows = channels_last(one - zero, axis)
        gamma = rows.mean(0)
        if bool((gamma.abs() < _LEAST_SCALE).any()):
            continue
        error = channels_last(end - zero, axis) - gamma * given
        if float(error.norm()) <= _ROUNDING * float(channels_last(end, axis).norm()):
            return gamma, axis
    return None


def _axis(layer: Layer) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _norm_after(replay: Replay, layer: Layer, call: Call) -> _BatchNorm | None:
    """The batch norm that reads what a layer gives."""
    given: list[Tensor] = []
    found: list[_BatchNorm] = []

    def keep(_layer: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        given.append(output)

    def compare(norm: _BatchNorm, args: tuple[Any, ...]) -> None:
        if given and args[0] is given[0]:
            found.append(norm)

    norms = [module for module in replay.modules() if isinstance(module, _BatchNorm)]
    with hooked(
        layer.register_forward_hook(keep), *(norm.register_forward_pre_hook(compare) for norm in norms)
    ):
        replay(call)
    return found[0] if len(found) == 1 and found[0].running_mean is not None else None
