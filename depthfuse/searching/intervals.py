"""How sure scores on a number of images are: intervals that hold the true value in 95 of 100 cases.

They are of one subnet. The best of many that were scored on the same images looks better than it is, by luck, and no
interval here takes that off.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

_Z = 1.959964  # of the normal distribution, 95 % on both sides


class Paired(NamedTuple):
    """A subnet and the unpruned net on the same images."""

    images: int
    lost: int  # images that the unpruned net answers right and the subnet wrong
    gained: int  # the other way round


def paired(whole: Tensor, subnet: Tensor) -> Paired:
    """Counts of two [N] bool, which images each answers right."""
    return Paired(len(whole), int((whole & ~subnet).sum()), int((~whole & subnet).sum()))


def wilson(percent: float, images: int) -> tuple[float, float]:
    """The interval of a share, in percent (Wilson, 1927): never outside 0 to 100, and right near the ends too."""
    share, z2 = percent / 100.0, _Z**2
    middle = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = _Z * math.sqrt(share * (1 - share) / images + z2 / (4 * images**2)) / (1 + z2 / images)
    return 100.0 * max(0.0, middle - half), 100.0 * min(1.0, middle + half)


def points_lost(pair: Paired) -> tuple[float, float, float]:
    """(percentage points that a subnet loses against the unpruned net, the interval's two ends); negative: it gains.

    Only images on which the two differ count, so that it is far narrower than the difference of two scores' own
    intervals. Adjusted Wald interval for paired proportions (Bonett and Price, 2012): one image is added to each of the
    two kinds on which they differ.
    """
    images, lost, gained = pair
    one, other = (lost + 1) / (images + 2), (gained + 1) / (images + 2)
    half = _Z * math.sqrt((one + other - (one - other) ** 2) / (images + 2))
    low, high = max(-1.0, one - other - half), min(1.0, one - other + half)
    return 100.0 * (lost - gained) / images, 100.0 * low, 100.0 * high
