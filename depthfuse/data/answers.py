"""Targets for images that nobody has sorted: a source of images whose targets come from elsewhere."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from depthfuse.data.images import ImageSource
from depthfuse.data.pixels import PixelSource
from depthfuse.data.targets import UNKNOWN
from depthfuse.errors import DataError


class Answered:
    """Images of a source with targets of their own.

    Args:
        source: of the images.
        positions: [N] int64, which of them are used.
        answers: [N] int64, the class of each.
    """

    def __init__(self, source: "PixelSource | ImageSource | Answered", positions: Tensor, answers: Tensor):
        self._source = source
        self._targets = torch.full((int(positions.max()) + 1 if len(positions) else 0,), UNKNOWN)
        self._targets[positions] = answers

    def eval_batches(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """One ([B, C, S, S] float32, [B] int64) for each list of positions."""
        batches = list(batches)
        for positions, (images, _) in zip(batches, self._source.eval_batches(batches), strict=True):
            yield images, self._targets[positions]

    def train_batches(
        self, batches: Iterable[Tensor], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `eval_batches`, augmented: an image's target is the same however it is moved."""
        batches = list(batches)
        given = self._source.train_batches(batches, seed, epoch)
        for positions, (images, _) in zip(batches, given, strict=True):
            yield images, self._targets[positions]


def check_answers(answers: Mapping[str, Tensor], sizes: Mapping[str, int], classes: int, where: str) -> None:
    """Raise DataError, naming `where`, unless each part of the data has one class below `classes` for each image."""
    for part, size in sizes.items():
        given = answers.get(part)
        if given is None or given.shape != (size,) or given.dtype != torch.int64:
            found = "none" if given is None else f"{list(given.shape)} {given.dtype}"
            raise DataError(
                f"{where} answers for other images: {found} for the {size} of {part}. Were images added or removed? "
                "Begin another run, or put them back"
            )
        if size and not 0 <= int(given.min()) <= int(given.max()) < classes:
            raise DataError(
                f"{where} holds classes of {part} that are not 0 to {classes - 1}: it is of another net"
            )
