"""Classification: one class an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.errors import TaskError
from depthfuse.tasks.task import Score, Task, shape_of


class Classification(Task):
    """Logits [N, classes]; targets [N] class indices, or [N, classes] probabilities in training. Score: top-1."""

    name = "classification"
    metric = "top-1"
    mixes = True

    def loss(self, output: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(output, targets, label_smoothing=label_smoothing)

    def taught(self, output: Tensor, teacher: Tensor, temperature: float | None = None) -> Tensor:
        if temperature is None:
            return F.cross_entropy(output, teacher.float().softmax(-1))
        soft = (teacher.float() / temperature).softmax(-1)
        log_soft = (output.float() / temperature).log_softmax(-1)
        return F.kl_div(log_soft, soft, reduction="batchmean") * temperature**2

    def measure(self, output: Tensor, targets: Tensor) -> Tensor:
        logits = output.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        right = self.right(logits, targets).sum()
        return torch.stack([right, loss, torch.tensor(len(targets), device=logits.device)])

    def right(self, output: Tensor, targets: Tensor) -> Tensor:
        return output.argmax(-1) == targets

    def score(self, counts: Tensor) -> Score:
        right, loss, count = counts.tolist()
        return Score(100.0 * right / count, loss / count)

    def check(self, output: Tensor, targets: Tensor, num_classes: int) -> None:
        if targets.ndim != 1 or targets.is_floating_point():
            raise TaskError(
                f"classification takes class indices [N] int64 as targets; the data gives {shape_of(targets)}"
            )
        if output.shape != (len(targets), num_classes):
            raise TaskError(
                f"classification takes logits [N, classes] = [{len(targets)}, {num_classes}]; the model gives "
                f"{shape_of(output)}"
            )


class Agreement(Classification):
    """Classification of images whose classes nobody knows: the targets are the original net's own answers."""

    metric = "agreement"
