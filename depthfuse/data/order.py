"""Which image comes when, as pure functions of seeds, so that a stopped run can be continued bit for bit."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Constant, so that the search and all trainings of a network hold the same images out, whatever their seed.
_SPLIT_SEED = 0
# One stream of random numbers for each purpose, so that none repeats another.
_ORDER, _AUGMENT, _SPLIT, _MIX, SHAPES = range(5)


def generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the non-negative integers `key`."""
    return torch.Generator().manual_seed(_mix(key))


def epoch_order(indices: Tensor, seed: int, epoch: int) -> Tensor:
    """`indices` [N] in the order of an epoch: a function of (seed, epoch) alone."""
    return indices[torch.randperm(len(indices), generator=generator(_ORDER, seed, epoch))]


def augment_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator for draws that are made for all images of an epoch at once."""
    return generator(_AUGMENT, seed, epoch)


def seeded_image(seed: int, epoch: int, index: int) -> contextlib.AbstractContextManager[None]:
    """Within it, Python's, NumPy's and torch's global CPU streams depend on (seed, epoch, index) alone."""
    return _seeded(_AUGMENT, seed, epoch, index)


def seeded_mix(seed: int, iteration: int) -> contextlib.AbstractContextManager[None]:
    """As `seeded_image`, for what is drawn once a batch."""
    return _seeded(_MIX, seed, iteration)


def balanced(indices: Tensor, labels: Tensor | None, count: int) -> Tensor:
    """The first `count` of `indices`, taken in turn from each class in a fixed random order.

    Args:
        indices: [N] int64, positions of images.
        labels: [N'] int64, the class of every position; None if unknown, which gives a random choice.
        count: number of images; all of them if there are fewer.

    Returns:
        [min(count, N)] int64; classes differ by at most one image while each still has some.
    """
    shuffled = indices[torch.randperm(len(indices), generator=generator(_SPLIT, _SPLIT_SEED))]
    if labels is None:
        return shuffled[:count]
    classes = labels[shuffled]
    rank = _rank_in_class(classes)
    turn = torch.argsort(rank * (int(classes.max()) + 1) + classes)
    return shuffled[turn][:count]


def split_holdout(indices: Tensor, labels: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """Divide `indices` [N] into (training, held out), class by class: `share` of each class is held out.

    Every class keeps at least one training image. The choice is fixed: it depends on no seed.
    """
    shuffled = indices[torch.randperm(len(indices), generator=generator(_SPLIT, _SPLIT_SEED))]
    classes = torch.zeros_like(shuffled) if labels is None else labels[shuffled]
    sizes = torch.bincount(classes)
    held = torch.minimum((sizes.double() * share).round().long(), (sizes - 1).clamp(min=0))
    out = _rank_in_class(classes) < held[classes]
    return shuffled[~out].sort().values, shuffled[out].sort().values


def divide(indices: Tensor, labels: Tensor | None, most: int | None, share: float) -> tuple[Tensor, Tensor]:
    """(training, held out) of `indices` [N], after all but `most` of them are left out, class by class."""
    if most is not None:
        indices = balanced(indices, labels, most)
    return split_holdout(indices, labels, share)


def _rank_in_class(classes: Tensor) -> Tensor:
    """[N]: how many earlier entries are of the same class."""
    order = torch.argsort(classes, stable=True)
    sizes = torch.bincount(classes)
    starts = torch.cumsum(sizes, 0) - sizes
    rank = torch.empty_like(classes)
    rank[order] = torch.arange(len(classes)) - starts[classes[order]]
    return rank


def _mix(key: tuple[int, ...]) -> int:
    """A 64-bit seed; NumPy promises that SeedSequence gives the same in every version."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed the three global CPU streams and put them back afterwards.

    timm's transforms and mixup draw from them. torch.manual_seed would also reseed GPUs, so it is not used.
    """
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = _mix(key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
