"""What is minimised in each training stage. One forward pass of an objective is one training step's loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthfuse.config import Schedule
from depthfuse.merging.supernet import Supernet
from depthfuse.spec import KEEP
from depthfuse.training.lambda_schedule import lambda_at

ScoreNet = Callable[[nn.Module], float]  # top-1 (percent) on held-out images
CalibrateNet = Callable[[nn.Module], None]  # re-estimate batch norm statistics in place


class Objective(nn.Module):
    """Loss of plain supervised training of `net`; the base of the others.

    A whole step is one forward pass, so that a data-parallel wrapper sees all of it and synchronises gradients once.
    """

    def __init__(self, net: nn.Module, label_smoothing: float = 0.0):
        super().__init__()
        self.net = net
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        """images [N, C, H, W], targets [N] class indices or [N, classes] probabilities; progress 0 to 1 -> scalar."""
        return self.label_loss(self.net(images), targets)

    def label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def evaluate(
        self, net: nn.Module, progress: float, score: ScoreNet, calibrate: CalibrateNet
    ) -> dict[str, float]:
        """Metrics of `net` (the trained net or its moving average). "top1" is there only where the state may be
        chosen as the best one."""
        return {"top1": score(net)}

    def status(self, progress: float) -> dict[str, float]:
        """What to record beside the loss."""
        return {}


class SandwichObjective(Objective):
    """Supernet training: the sandwich rule with in-place distillation (US-Nets, Yu & Huang, ICCV 2019).

    Each step runs the full net, the fully pruned net and `random_subnets` random ones. The full net learns from the
    labels, the others from its soft labels.
    """

    net: Supernet

    def __init__(
        self,
        supernet: Supernet,
        options: Mapping[str, Sequence[str]] | None = None,  # {block: candidates worth training}
        random_subnets: int = 1,
        label_smoothing: float = 0.0,
    ):
        super().__init__(supernet, label_smoothing)
        own = supernet.options()
        allowed = own if options is None else options
        # as the family orders them: a space puts the cheapest first, and a ViT of dropped blocks can only guess
        self.options = {
            path: [name for name in own[path] if name in names] for path, names in allowed.items()
        }
        self.random_subnets = random_subnets

    def fully_pruned(self, rng: random.Random | None = None) -> dict[str, str]:
        """Every block pruned: with its first candidate, or with a random one if an `rng` is given."""
        pick = rng.choice if rng else (lambda names: names[0])
        return {path: pick(names) if names else KEEP for path, names in self.options.items()}

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        rng = random.Random(int(torch.randint(2**31, ()).item()))
        self.net.set_choices({})
        logits = self.net(images)
        loss = self.label_loss(logits, targets)
        soft = logits.detach().float().softmax(-1)
        for choices in [
            self.fully_pruned(rng),
            *(self.net.sample(rng, self.options) for _ in range(self.random_subnets)),
        ]:
            self.net.set_choices(choices)
            loss = loss + F.cross_entropy(self.net(images), soft)
        return loss / (2 + self.random_subnets)

    def evaluate(
        self, net: nn.Module, progress: float, score: ScoreNet, calibrate: CalibrateNet
    ) -> dict[str, float]:
        assert isinstance(net, Supernet)
        metrics = {}
        for name, choices in (("top1_full", {}), ("top1_pruned", self.fully_pruned())):
            net.set_choices(choices)
            calibrate(net)
            metrics[name] = score(net)
        net.set_choices({})
        return metrics


class TaughtObjective(Objective):
    """Training on labels and, optionally, on the soft labels of a teacher (Hinton et al., 2015)."""

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module | None = None,
        distill: float = 0.5,  # weight of the teacher's loss beside the labels' (1 - distill)
        temperature: float = 2.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(net, label_smoothing)
        # in a list: the teacher is no part of the state, is never trained, and must not be wrapped or counted
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        self.distill, self.temperature = distill, temperature

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        logits = self.net(images)
        loss = self.label_loss(logits, targets)
        if self._teacher and self.distill > 0.0:
            t = self.temperature
            with torch.no_grad():
                soft = (self._teacher[0](images).float() / t).softmax(-1)
            taught = F.kl_div((logits.float() / t).log_softmax(-1), soft, reduction="batchmean") * t**2
            loss = (1.0 - self.distill) * loss + self.distill * taught
        return loss


class ProgressiveObjective(TaughtObjective):
    """Progressive subnet training: lambda falls from 1 to 0 per step (UPDP, step 3)."""

    net: Supernet

    def __init__(self, subnet: Supernet, schedule: Schedule = "cosine", share: float = 0.4, **teaching: Any):
        super().__init__(subnet, **teaching)
        self.schedule, self.share = schedule, share

    def lam(self, progress: float) -> float:
        return lambda_at(progress, self.schedule, self.share)

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        self.net.set_lambda(self.lam(progress))
        return super().forward(images, targets, progress)

    def evaluate(
        self, net: nn.Module, progress: float, score: ScoreNet, calibrate: CalibrateNet
    ) -> dict[str, float]:
        assert isinstance(net, Supernet)
        lam = self.lam(progress)
        net.set_lambda(lam)
        # a net that is still on its way cannot be merged, so it cannot be the best one either
        return {"top1" if lam == 0.0 else "top1_mixed": score(net)}

    def status(self, progress: float) -> dict[str, Any]:
        return {"lambda": self.lam(progress)}
