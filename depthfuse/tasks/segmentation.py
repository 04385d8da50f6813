"""Semantic segmentation: one class a pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.data.targets import IGNORED
from depthfuse.errors import TaskError
from depthfuse.tasks.task import Score, Task, class_loss, shape_of


class Segmentation(Task):
    """Logits [N, classes, h, w], resized bilinearly to the masks where they are smaller; targets [N, H, W] class
    indices of any integer dtype, 255 where a pixel counts nowhere.

    Loss: the pixels' mean cross-entropy. Score: mean intersection over union, of all pixels of all images, over the
    classes that occur in masks or predictions.
    """

    name = "segmentation"
    metric = "mean IoU"
    targets = "masks"

    def loss(self, output: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        summed, count = self._summed(output, targets, label_smoothing)
        return summed / count.clamp(min=1)  # a batch without any pixel that counts teaches nothing

    def _summed(self, output: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
        logits, masks = _resized(output, targets), targets.long()
        loss = F.cross_entropy(
            logits, masks, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
        )
        return loss, (masks != IGNORED).sum()

    def taught(self, output: Tensor, teacher: Tensor, temperature: float | None = None) -> Tensor:
        return class_loss(output, teacher, 1.0 if temperature is None else temperature)

    def measure(self, output: Tensor, targets: Tensor) -> Tensor:
        """[2 * classes + 2]: intersections, unions, summed loss, pixels."""
        loss, count = self._summed(output, targets, 0.0)
        counted = targets != IGNORED
        wanted = targets.long()[counted]
        predicted = _resized(output, targets).argmax(1)[counted]
        classes = output.shape[1]
        both = torch.bincount(wanted[wanted == predicted], minlength=classes)
        either = (
            torch.bincount(wanted, minlength=classes) + torch.bincount(predicted, minlength=classes) - both
        )
        return torch.cat([both.double(), either.double(), loss.double()[None], count.double()[None]])

    def score(self, counts: Tensor) -> Score:
        both, either = counts[:-2].chunk(2)
        loss, pixels = counts[-2:].tolist()
        there = either > 0
        mean = float((both[there] / either[there]).mean()) if bool(there.any()) else 0.0
        return Score(100.0 * mean, loss / max(pixels, 1.0))

    def check(self, output: Tensor, targets: Tensor, num_classes: int) -> None:
        if targets.ndim != 3 or targets.is_floating_point():
            raise TaskError(
                f"segmentation takes masks [N, H, W] of class indices as targets; the data gives {shape_of(targets)}"
            )
        wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= num_classes))]
        if len(wrong):
            raise TaskError(
                f"the masks hold class {int(wrong[0])}, where 0 to {num_classes - 1} are known; {IGNORED} marks pixels "
                "that do not count"
            )
        if output.ndim != 4 or output.shape[:2] != (len(targets), num_classes):
            raise TaskError(
                f"segmentation takes logits [N, classes, h, w] = [{len(targets)}, {num_classes}, h, w]; the model "
                f"gives {shape_of(output)}"
            )


def _resized(output: Tensor, masks: Tensor) -> Tensor:
    """Logits [N, classes, H, W] float32 of the masks' size."""
    if output.shape[-2:] == masks.shape[-2:]:
        return output.float()
    return F.interpolate(output.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
