"""A layer as a linear regression: the rows that it reads, and the rows that it shall give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthfuse.errors import FitError
from depthfuse.fitting.least_squares import Sums

Layer = nn.Conv2d | nn.Linear

LARGEST_FEATURES = 4608  # a 3x3 over 512 channels: 170 MB of sums, a minute of solving
_ROWS_A_FEATURE = 40
_HELD_OUT = 4  # one batch in so many decides the ridge


def features_of(layer: Layer) -> int:
    """How many inputs an output of a layer reads."""
    return layer.weight[0].numel()


def sums_of(
    layer: Layer, pairs: Iterable[tuple[Tensor, Tensor]], count: int, axis: int, seed: int = 0
) -> tuple[Sums, Sums]:
    """(rows to fit, rows held out) of a layer, float64.

    Args:
        pairs: for each batch of images (what the layer reads, what it shall give), the channels of which are along
            `axis`. count: of the batches.
        seed: of the choice of positions, where images have more than are needed.

    Raises FitError for numbers that are not finite, and where the two have not the same positions.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[bool, Sums] = {}
    most = _ROWS_A_FEATURE * max(features_of(layer), 64) // count
    for index, (read, wanted) in enumerate(pairs):
        rows = _rows(layer, read), _grouped(channels_last(wanted, axis).double(), layer)
        if len(rows[0]) != len(rows[1]):
            raise FitError("its layer works on other positions than the block gives")
        if len(rows[0]) > most:
            chosen = torch.randperm(len(rows[0]), generator=generator)[:most]
            rows = rows[0][chosen], rows[1][chosen]
        if not sums:
            sums = {held_out: Sums.around(*rows) for held_out in (False, True)}
        sums[index % _HELD_OUT == _HELD_OUT - 1 or (count < _HELD_OUT and index == 1)].add(*rows)
    return sums[False], sums[True]


def set_weight(layer: Layer, weight: Tensor) -> None:
    """weight: [G, F, O]."""
    layer.weight.copy_(weight.movedim(1, 2).reshape(layer.weight.shape))


def weight_of(layer: Layer) -> Tensor:
    """[G, F, O], float64."""
    groups = getattr(layer, "groups", 1)
    return layer.weight.flatten(1).double().reshape(groups, -1, features_of(layer)).movedim(1, 2)


@torch.no_grad()
def reads_rows(layer: Layer, read: Tensor, given: Tensor) -> bool:
    """Whether a layer gives what the regression of what it reads gives: not where it pads in another way."""
    if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        return False
    axis = -1 if isinstance(layer, nn.Linear) else 1
    wanted = _grouped(channels_last(given[:1], axis).double(), layer)
    rows = _rows(layer, read[:1])
    if len(rows) != len(wanted):
        return False
    found = torch.einsum("ngf,gfo->ngo", rows, weight_of(layer))
    if layer.bias is not None:
        found = found + layer.bias.double().reshape(found.shape[1:])
    return bool((found - wanted).norm() <= 1e-4 * wanted.norm())


def along(values: Tensor, axis: int, dims: int) -> Tensor:
    """[C], to be multiplied with a tensor of `dims` axes along one of them."""
    return values.reshape([-1 if d == axis % dims else 1 for d in range(dims)])


def channels_last(x: Tensor, axis: int) -> Tensor:
    """[..., C, ...] -> [positions, C]"""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def _rows(layer: Layer, x: Tensor) -> Tensor:
    """What the layer reads at each position: [positions, groups, features]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1]).double()
    windows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [N, I * k * k, L]
    return windows.movedim(1, 2).reshape(-1, layer.groups, features_of(layer)).double()


def _grouped(rows: Tensor, layer: Layer) -> Tensor:
    """[positions, O] -> [positions, groups, O / groups]"""
    return rows.reshape(len(rows), getattr(layer, "groups", 1), -1)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Hooks that are there for a while, from their handles."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
