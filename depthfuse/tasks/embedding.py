"""Embedding: images of one class near each other, those of others far away; for retrieval."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.errors import TaskError
from depthfuse.tasks.task import Score, Task, shape_of

_TEMPERATURE = 0.1  # of the loss; Khosla et al. found it best


class Embedding(Task):
    """Embeddings [N, D] of any length, compared by their cosine; targets [N] class indices.

    Loss: supervised contrastive (Khosla et al., NeurIPS 2020, L_out). A teacher teaches by the cosine distance to its
    own embedding. Score: recall@1, the share of images whose nearest other image is of their class.
    """

    name = "embedding"
    metric = "recall@1"
    divisible = False
    by_class = False

    def loss(self, output: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Images that are alone of their class in the batch are compared with, and pull at nothing."""
        unit = F.normalize(output.float(), dim=1)
        own = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        likeness = (unit @ unit.T / _TEMPERATURE).masked_fill(own, float("-inf"))
        positive = (targets[:, None] == targets) & ~own
        log_shares = likeness.log_softmax(1).masked_fill(~positive, 0.0)  # after the softmax: no 0 * inf
        partners = positive.sum(1)
        each = -log_shares.sum(1) / partners.clamp(min=1)
        return each.sum() / (partners > 0).sum().clamp(min=1)

    def taught(self, output: Tensor, teacher: Tensor, temperature: float | None = None) -> Tensor:
        return (1.0 - F.cosine_similarity(output.float(), teacher.float(), dim=1)).mean()

    def measure(self, output: Tensor, targets: Tensor) -> Tensor:
        """[n, D + 2]: embeddings of length 1, classes, and the batch's loss."""
        unit = F.normalize(output.float(), dim=1).double()
        loss = self.loss(output, targets).double().expand(len(targets))
        return torch.cat([unit, targets.double()[:, None], loss[:, None]], dim=1)

    def score(self, counts: Tensor) -> Score:
        unit, classes, losses = counts[:, :-2], counts[:, -2], counts[:, -1]
        found = 0
        for start in range(0, len(unit), 1024):  # the whole table of cosines may be large
            likeness = unit[start : start + 1024] @ unit.T
            rows = torch.arange(len(likeness), device=unit.device)
            likeness[rows, start + rows] = float("-inf")
            found += int((classes[likeness.argmax(1)] == classes[start : start + 1024]).sum())
        return Score(100.0 * found / len(unit), float(losses.mean()))

    def check(self, output: Tensor, targets: Tensor, num_classes: int) -> None:
        if targets.ndim != 1 or targets.is_floating_point():
            raise TaskError(
                f"embedding takes class indices [N] int64 as targets; the data gives {shape_of(targets)}"
            )
        if output.ndim != 2 or len(output) != len(targets):
            raise TaskError(
                f"embedding takes embeddings [N, D] = [{len(targets)}, D]; the model gives {shape_of(output)}"
            )
