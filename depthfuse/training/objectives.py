"""What is minimised in each training stage. One forward pass of an objective is one training step's loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.config import Schedule
from depthfuse.merging.supernet import Supernet
from depthfuse.spec import KEEP
from depthfuse.tasks import CLASSIFICATION, Task
from depthfuse.training.features import feature_loss, recorded
from depthfuse.training.lambda_schedule import lambda_at

ScoreNet = Callable[[nn.Module], float]  # the task's metric (percent) on held-out images
CalibrateNet = Callable[[nn.Module], None]  # re-estimate batch norm statistics in place


class Objective(nn.Module):
    """Loss of plain supervised training of `net`; the base of the others.

    A whole step is one forward pass, so that a data-parallel wrapper sees all of it and synchronises gradients once.
    """

    def __init__(self, net: nn.Module, label_smoothing: float = 0.0, task: Task = CLASSIFICATION):
        super().__init__()
        self.net = net
        self.label_smoothing = label_smoothing
        self.task = task

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        """images [N, C, H, W], targets as the task takes them; progress 0 to 1 -> scalar."""
        return self.label_loss(self.task.read(self.net(images)), targets)

    def label_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss(output, targets, self.label_smoothing)

    def evaluate(
        self, net: nn.Module, progress: float, score: ScoreNet, calibrate: CalibrateNet
    ) -> dict[str, float]:
        """Metrics of `net` (the trained net or its moving average). The task's own `key` is there only where the state
        may be chosen as the best one."""
        return {self.task.key: score(net)}

    def status(self, progress: float) -> dict[str, float]:
        """What to record beside the loss."""
        return {}


class SandwichObjective(Objective):
    """Supernet training: the sandwich rule with in-place distillation (US-Nets, Yu & Huang, ICCV 2019).

    Each step runs the full net, the fully pruned net and `random_subnets` random ones. The full net learns from the
    labels, the others from its outputs, by the task's `taught`.
    """

    net: Supernet

    def __init__(
        self,
        supernet: Supernet,
        options: Mapping[str, Sequence[str]] | None = None,  # {block: candidates worth training}
        random_subnets: int = 1,
        label_smoothing: float = 0.0,
        task: Task = CLASSIFICATION,
    ):
        super().__init__(supernet, label_smoothing, task)
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
        whole = self.task.read(self.net(images))
        loss = self.label_loss(whole, targets)
        for choices in [
            self.fully_pruned(rng),
            *(self.net.sample(rng, self.options) for _ in range(self.random_subnets)),
        ]:
            self.net.set_choices(choices)
            loss = loss + self.task.taught(self.task.read(self.net(images)), whole.detach())
        return loss / (2 + self.random_subnets)

    def evaluate(
        self, net: nn.Module, progress: float, score: ScoreNet, calibrate: CalibrateNet
    ) -> dict[str, float]:
        assert isinstance(net, Supernet)
        metrics = {}
        for name, choices in (("full", {}), ("pruned", self.fully_pruned())):
            net.set_choices(choices)
            calibrate(net)
            metrics[f"{self.task.key}_{name}"] = score(net)
        net.set_choices({})
        return metrics


class TaughtObjective(Objective):
    """Training on labels and, optionally, on the outputs of a teacher, by the task's `taught`."""

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module | None = None,
        distill: float = 0.5,  # weight of the teacher's loss beside the labels' (1 - distill)
        temperature: float = 2.0,
        label_smoothing: float = 0.0,
        task: Task = CLASSIFICATION,
    ):
        super().__init__(net, label_smoothing, task)
        # in a list: the teacher is no part of the state, is never trained, and must not be wrapped or counted
        self._teacher = [] if teacher is None else [teacher.eval().requires_grad_(False)]
        self.distill, self.temperature = distill, temperature

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        return self.taught_loss(self.net(images), self.ask_teacher(images), targets)

    def ask_teacher(self, images: Tensor) -> Tensor | None:
        """What the teacher gives, as the task reads it; None without one."""
        if not self._teacher:
            return None
        with torch.no_grad():
            return self.task.read(self._teacher[0](images))

    def taught_loss(self, given: Any, wanted: Tensor | None, targets: Tensor) -> Tensor:
        """Of what the net gives, the teacher gives, and the labels."""
        output = self.task.read(given)
        loss = self.label_loss(output, targets)
        if wanted is None:
            return loss
        return (1.0 - self.distill) * loss + self.distill * self.task.taught(output, wanted, self.temperature)


class ProgressiveObjective(TaughtObjective):
    """Progressive subnet training: lambda falls from 1 to 0 per step (UPDP, step 3)."""

    net: Supernet

    def __init__(
        self,
        subnet: Supernet,
        schedule: Schedule = "cosine",
        share: float = 0.4,
        features: float = 0.0,  # weight of the distance to the teacher's blocks, where there is a teacher
        **teaching: Any,
    ):
        super().__init__(subnet, **teaching)
        self.schedule, self.share, self.features = schedule, share, features

    def lam(self, progress: float) -> float:
        return lambda_at(progress, self.schedule, self.share)

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        self.net.set_lambda(self.lam(progress))
        paths = list(self.net.blocks) if self._teacher and self.features > 0.0 else []
        if not paths:
            return super().forward(images, targets, progress)
        with recorded(self._teacher[0], paths) as wanted:
            answers = self.ask_teacher(images)
        with recorded(self.net.model, paths) as outputs:
            loss = self.taught_loss(self.net(images), answers, targets)
        return loss + self.features * feature_loss(outputs, wanted)

    def evaluate(
        self, net: nn.Module, progress: float, score: ScoreNet, calibrate: CalibrateNet
    ) -> dict[str, float]:
        assert isinstance(net, Supernet)
        lam = self.lam(progress)
        net.set_lambda(lam)
        # a net that is still on its way cannot be merged, so it cannot be the best one either
        return {self.task.key if lam == 0.0 else f"{self.task.key}_mixed": score(net)}

    def status(self, progress: float) -> dict[str, Any]:
        return {"lambda": self.lam(progress)}
