"""`Task`: what a model is trained for. Data in, loss for training, score for the search."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from depthfuse.data.targets import Targets
from depthfuse.errors import TaskError

# Where the dictionaries and objects that models return keep what the task is about: torchvision's segmentation models,
# transformers' ModelOutput.
_PLACES = ("out", "logits")


class Score(NamedTuple):
    """How well a net does on some images."""

    top1: float  # the task's metric in percent, higher is better; by its first task's name, as in the files of runs
    loss: float  # mean; cross-entropy of classification and segmentation in nats


class Task(ABC):
    """The base of all tasks. A task of your own writes `loss`, `measure`, `score` and `check`.

    Attributes:
        name: as in --task and in config.yaml.
        metric: what `score` gives, as reports write it: "top-1", "mean IoU". In percent, higher is better.
        targets: what the built-in data sets shall give: "classes" [N] int64, "masks" [N, H, W] of class indices, or
            "boxes" [N, M, 5] float32 (see `depthfuse.tasks.detection`). Data of your own gives what it likes.
        divisible: whether what `measure` counts of several batches may be added up, over processes, too; otherwise it
            is concatenated, and every process sees all images.
        mixes: whether `loss` takes soft targets [N, classes], as mixup and cutmix give.
        by_class: whether a model is built with as many num_classes as the data has; otherwise with those of its own
            arguments, 0 by default, for which timm's give their features.
    """

    name: str
    metric: str
    targets: Targets = "classes"
    divisible = True
    mixes = False
    by_class = True

    @property
    def key(self) -> str:
        """The metric's name as a column of metrics.csv: "top1", "mean_iou"."""
        return re.sub(r"\W", "", self.metric.lower().replace(" ", "_"))

    def read(self, output: Any) -> Tensor:
        """The tensor that all other methods take, of what a model returns: itself, or its entry "out" or "logits".

        Raises TaskError for anything else.
        """
        if isinstance(output, Tensor):
            return output
        for place in _PLACES:
            found = output.get(place) if isinstance(output, Mapping) else getattr(output, place, None)
            if isinstance(found, Tensor):
                return found
        kind = type(output).__name__
        held = f"{kind} of {', '.join(map(str, output))}" if isinstance(output, Mapping) else kind
        raise TaskError(
            f"{self.name} takes a model that returns a tensor, or one under {' or '.join(map(repr, _PLACES))}; this "
            f"one returns a {held:.200}: wrap it, or give a task with a `read` of its own"
        )

    @abstractmethod
    def loss(self, output: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """What training minimises: a scalar with a gradient."""

    def taught(self, output: Tensor, teacher: Tensor, temperature: float | None = None) -> Tensor:
        """The loss of an output that another net's output teaches: a scalar; here the mean squared error.

        Args:
            teacher: what `read` gives of the teacher, without a gradient.
            temperature: softens class probabilities, where there are such; None in the sandwich rule's distillation in
                place, which does without.
        """
        return F.mse_loss(output.float(), teacher.float())

    @abstractmethod
    def measure(self, output: Tensor, targets: Tensor) -> Tensor:
        """What `score` needs to know of a batch: [K], to be added up, or rows [n, K] where it is not divisible.

        targets: on the output's device, as the data gives them.
        """

    def right(self, output: Tensor, targets: Tensor) -> Tensor | None:
        """[N] bool, which images are answered right, where the score is the share of them; None for any other score."""
        return None

    @abstractmethod
    def score(self, counts: Tensor) -> Score:
        """The score of all images, of what `measure` gave for each batch: float64, added up or concatenated."""

    @abstractmethod
    def check(self, output: Tensor, targets: Tensor, num_classes: int) -> None:
        """Raise TaskError, naming what was given and what is expected, unless a model's output for a batch of images
        and the batch's targets are of this task. Called once, before anything is trained."""


def class_loss(output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft labels (Hinton et al., 2015): divergence of class probabilities at a temperature, times its square.

    output, teacher: [N, classes, ...]; summed over classes, averaged over all else.
    """
    soft = (teacher.float() / temperature).softmax(1)
    divergence = F.kl_div((output.float() / temperature).log_softmax(1), soft, reduction="sum")
    return divergence * temperature**2 * (output.shape[1] / output.numel())


def shape_of(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
