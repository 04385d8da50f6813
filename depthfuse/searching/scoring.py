"""Scores of subnets on held-out images, each beside the unpruned net on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from depthfuse.config import SearchMetric
from depthfuse.data import DataBundle
from depthfuse.merging.supernet import Supernet
from depthfuse.searching.intervals import Paired, paired
from depthfuse.searching.space import Choices
from depthfuse.tasks import Task
from depthfuse.training.evaluation import evaluate

_TEMPERATURE = 1.0  # probabilities as they are


class SubnetScore(NamedTuple):
    """A `Score` of a subnet, and its divergence from the unpruned net, by `Task.taught`, where that was asked for."""

    top1: float
    loss: float
    divergence: float | None = None


def value_of(score: SubnetScore, metric: SearchMetric) -> float:
    """What ranks a score, higher is better; least of all what is no number, or was scored by another metric."""
    if metric == "top1":
        return score.top1
    lost = score.loss if metric == "loss" else score.divergence
    return -math.inf if lost is None or math.isnan(lost) else -lost


class Scorer:
    """Scores subnets after `settle` has set their batch norms to rights.

    Which images the unpruned net answers right is found once, when it is first needed, and kept in memory: one bool an
    image. Of the others only two counts are kept (`Paired`). A search that goes on after a kill finds it again.

    divergence: also how far a subnet's outputs are from the unpruned net's, all of which are then kept in memory.
    """

    def __init__(
        self,
        supernet: Supernet,
        data: DataBundle,
        settle: Callable[[], None],
        task: Task,
        divergence: bool = False,
    ):
        self.supernet, self.data, self.settle, self.task = supernet, data, settle, task
        self.divergence = divergence
        self._whole: tuple[SubnetScore, Tensor | None] | None = None
        self._outputs: list[Tensor] = []

    def __call__(self, choices: Choices) -> tuple[SubnetScore, Paired | None]:
        """Of a subnet; None instead of counts where the task's score is no share of images."""
        if self._whole is None:
            self._whole = self._judged({})
        score, right = self._judged(choices) if choices else self._whole
        whole = self._whole[1]
        return score, None if whole is None or right is None else paired(whole, right)

    def _judged(self, choices: Choices) -> tuple[SubnetScore, Tensor | None]:
        """The score, and [N] bool, which images are answered right."""
        self.supernet.set_choices(choices)
        self.settle()
        found: list[Tensor | None] = []
        sums: list[tuple[float, int]] = []

        def watch(output: Tensor, targets: Tensor) -> None:
            right = self.task.right(output, targets)
            found.append(None if right is None else right.cpu())
            if not self.divergence:
                return
            if self._whole is None:
                self._outputs.append(output.cpu())
            whole = self._outputs[len(sums)].to(output.device)
            sums.append((float(self.task.taught(output, whole, _TEMPERATURE)), len(output)))

        top1, loss = evaluate(self.supernet, self.data.holdout_loader(), task=self.task, watch=watch)
        divergence = sum(d * n for d, n in sums) / sum(n for _, n in sums) if sums else None
        known = [right for right in found if right is not None]
        score = SubnetScore(top1, loss, divergence)
        return score, torch.cat(known) if len(known) == len(found) else None
