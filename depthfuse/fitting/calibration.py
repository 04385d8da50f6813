"""The images that blocks are fitted on, and what the original net does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from depthfuse.data import DataBundle
from depthfuse.errors import FitError
from depthfuse.fitting.fit import fit_candidates, fit_chosen
from depthfuse.fitting.statistics import BatchMoments, match_moments, output_moments
from depthfuse.merging.supernet import Supernet

_BATCH = 32  # images; one batch in four decides how far the others are trusted


class Calibration:
    """Fits a supernet `with_fitted` that knows the original net only, in place.

    images: how many of the training images, not augmented, without their labels. Raises FitError for too few.
    """

    def __init__(self, supernet: Supernet, data: DataBundle, images: int):
        if images < 2 * _BATCH:
            raise FitError(
                f"merged blocks are fitted on {2 * _BATCH} images at least, a few hundred are better, and "
                f"search.calibration_images is {images}"
            )
        self.supernet = supernet.eval()
        device = next(supernet.parameters()).device
        all_images = torch.cat([batch for batch, _ in data.calibration_loader(images)])
        if len(all_images) < 2 * _BATCH:
            raise FitError(
                f"there are {len(all_images)} training images, and fitting takes {2 * _BATCH} at least"
            )
        self.batches: list[Tensor] = [
            batch.to(device, memory_format=torch.channels_last) for batch in all_images.split(_BATCH)
        ]

    @cached_property
    def _moments(self) -> BatchMoments:
        """What the norms of the original net give; those of blocks that are kept still are as they were then."""
        chosen = self.supernet.choices()
        self.supernet.set_choices({})
        moments = output_moments(self.supernet, self.batches)
        self.supernet.set_choices(chosen)
        return moments

    def fit_candidates(self, options: Mapping[str, Sequence[str]]) -> None:
        """Fit each candidate alone, for the search."""
        fit_candidates(self.supernet, self.batches, options)

    def fit_chosen(self, kept: bool = True) -> None:
        """Fit the chosen candidates one after another, and, if `kept`, the last layers of the blocks between and after
        them."""
        _ = self._moments  # of the original net, whose blocks change
        fit_chosen(self.supernet, self.batches, kept)

    def settle(self) -> None:
        """Make the batch norms of the chosen subnet give what those of the original net gave."""
        match_moments(self.supernet, self.batches, self._moments)
