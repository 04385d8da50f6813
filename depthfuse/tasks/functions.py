"""A task of two functions of the user's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from depthfuse.data.targets import Targets
from depthfuse.errors import TaskError
from depthfuse.tasks.task import Score, Task, shape_of

# Columns of metrics.csv that are taken.
_RESERVED = ("stage", "iteration", "epoch", "loss", "lr", "lambda", "")


class TaskOfFunctions(Task):
    """A task of two functions.

    Args:
        loss: (what the model gives, targets) -> scalar with a gradient, the mean over the batch.
        quality: (what the model gives, targets) -> [N], how good each image's output is, from 0 to 1; its mean over all
            images, in percent, is the score.
        name, metric, targets: see `Task`.

    The model gives a tensor, alone or as "out" or "logits". A teacher teaches by the squared error of the outputs.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        quality: Callable[[Tensor, Tensor], Tensor],
        *,
        name: str,
        metric: str,
        targets: Targets = "classes",
    ):
        self._loss, self._quality = loss, quality
        self.name, self.metric, self.targets = name, metric, targets
        if self.key in _RESERVED:
            raise TaskError(f"the metric's name {metric!r} is taken or holds no letter: choose another")

    def loss(self, output: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return self._loss(output, targets)

    def measure(self, output: Tensor, targets: Tensor) -> Tensor:
        """[3]: summed quality, summed loss, images."""
        quality = self._of_images(output, targets)
        loss = self._loss(output, targets).detach() * len(quality)
        count = torch.tensor(float(len(quality)), device=quality.device)
        return torch.stack([quality.double().sum(), loss.double(), count.double()])

    def score(self, counts: Tensor) -> Score:
        quality, loss, count = counts.tolist()
        return Score(100.0 * quality / count, loss / count)

    def check(self, output: Tensor, targets: Tensor, num_classes: int) -> None:
        self._of_images(output, targets)

    def _of_images(self, output: Tensor, targets: Tensor) -> Tensor:
        quality = self._quality(output, targets)
        if not isinstance(quality, Tensor) or quality.shape != (len(targets),):
            given = shape_of(quality) if isinstance(quality, Tensor) else type(quality).__name__
            raise TaskError(
                f"the quality of {self.name} is {given}, expected a number an image, [{len(targets)}]"
            )
        return quality
