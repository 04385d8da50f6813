"""lambda schedules of progressive training: pure functions of the progress of training."""

from __future__ import annotations

import math
from typing import get_args

from depthfuse.config import Schedule


def lambda_at(progress: float, schedule: Schedule = "cosine", share: float = 0.4) -> float:
    """lambda in [0, 1] after `progress` (0 to 1, iterations done / all iterations) of subnet training.

    Falls from 1 (the original block) to 0 (the pruned one) over the first `share` of training and then stays at
    exactly 0. "none" is 0 throughout: direct removal. UPDP (arXiv 2401.06426) does not publish its schedule; linear is
    SLAB's (ICML 2024), cosine MixFormerV2's (NeurIPS 2023). Raises ValueError for a share outside (0, 1) or an
    unknown schedule.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"share must lie between 0 and 1 (both excluded), not {share}: training must end at lambda = 0"
        )
    if schedule not in get_args(Schedule):
        raise ValueError(f"unknown lambda schedule {schedule!r}; known: {', '.join(get_args(Schedule))}")
    if schedule == "none" or progress >= share:
        return 0.0
    done = max(0.0, progress) / share
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
