"""Scores of subnets on held-out images, each beside the unpruned net on the same images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from depthfuse.data import DataBundle
from depthfuse.merging.supernet import Supernet
from depthfuse.searching.intervals import Paired, paired
from depthfuse.searching.space import Choices
from depthfuse.tasks import Score, Task
from depthfuse.training.evaluation import evaluate


class Scorer:
    """Scores subnets after `settle` has set their batch norms to rights.

    Which images the unpruned net answers right is found once, when it is first needed, and kept in memory: one bool an
    image. Of the others only two counts are kept (`Paired`). A search that goes on after a kill finds it again.
    """

    def __init__(self, supernet: Supernet, data: DataBundle, settle: Callable[[], None], task: Task):
        self.supernet, self.data, self.settle, self.task = supernet, data, settle, task
        self._whole: tuple[Score, Tensor | None] | None = None

    def __call__(self, choices: Choices) -> tuple[Score, Paired | None]:
        """Of a subnet; None instead of counts where the task's score is no share of images."""
        if self._whole is None:
            self._whole = self._judged({})
        score, right = self._judged(choices) if choices else self._whole
        whole = self._whole[1]
        return score, None if whole is None or right is None else paired(whole, right)

    def _judged(self, choices: Choices) -> tuple[Score, Tensor | None]:
        """The score, and [N] bool, which images are answered right."""
        self.supernet.set_choices(choices)
        self.settle()
        found: list[Tensor | None] = []

        def watch(output: Tensor, targets: Tensor) -> None:
            right = self.task.right(output, targets)
            found.append(None if right is None else right.cpu())

        score = evaluate(self.supernet, self.data.holdout_loader(), task=self.task, watch=watch)
        known = [right for right in found if right is not None]
        return score, torch.cat(known) if len(known) == len(found) else None
