"""The images that a file in 8 bits is made by and judged by: those that ranges are taken from, and others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.running.conversion import Run
from depthfuse.data import Batches, DataBundle
from depthfuse.errors import DataError, ExportError
from depthfuse.exporting.subject import NONE, SIZES, Subject
from depthfuse.tasks import AGREEMENT, CLASSIFICATION, Task
from depthfuse.training.evaluation import evaluate

Batch = tuple[Tensor, Tensor]

LEAST_IMAGES = 16  # for the ranges: fewer do not reach what a layer's values reach
_MOST_JUDGED = 5000  # of a bundle, which decodes them anew for each try
_MOST_KEPT = 1000  # of what comes once, and is kept in memory
_BATCH = 64
# Points that may be lost where nobody says: of a score; of agreement with the model itself, of which more is lost, as a
# changed answer may as well be a corrected one.
_POINTS, _POINTS_OF_AGREEMENT = 0.5, 5.0


@dataclass(frozen=True)
class Samples:
    """What quantising sees.

    images: [n, C, H, W] each, n being 1, or the batch where that is fixed; ranges are taken from them. held_out: other
    images with their targets, which can be gone through several times. count: of the held out. task: what scores.
    metric: that it scores by, as messages name it. points: of it, that may be lost.
    """

    images: tuple[Tensor, ...]
    held_out: Iterable[Batch]
    count: int
    task: Task
    metric: str
    points: float

    def score(self, run: Run) -> float:
        """What a file reaches on the images held out, in percent."""
        return evaluate(_AsModule(run), self.held_out, task=self.task).top1

    def compare(self, run: Run, reference: Run) -> tuple[float, float]:
        """What a file reaches, in percent, and the squared error of its outputs over the squares of another's.

        The error is infinite where it is no number.
        """
        compared = _Compared(run, reference)
        score = evaluate(compared, self.held_out, task=self.task).top1
        error = compared.error / compared.squares if compared.squares > 0 else math.nan
        return score, error if math.isfinite(error) else math.inf


class _AsModule(nn.Module):
    """A file in its runtime as a net on the CPU."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self.register_buffer("place", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images)[0]


class _Compared(_AsModule):
    """The same, which sums up by how much its outputs differ from another file's."""

    def __init__(self, run: Run, reference: Run) -> None:
        super().__init__(run)
        self._reference = reference
        self.error = self.squares = 0.0

    def forward(self, images: Tensor) -> Tensor:
        output, exact = super().forward(images), self._reference(images)[0].double()
        self.error += float((output.double() - exact).square().sum())
        self.squares += float(exact.square().sum())
        return output


def samples_of(
    given: DataBundle | Tensor | Iterable[Any] | None,
    subject: Subject,
    count: int,
    points: float | None,
    task: Task | None,
) -> Samples:
    """Take images to calibrate by, and others to judge by.

    Args:
        given: a bundle, of which `count` training images calibrate and those held out judge; or images as the model
            takes them, [N, C, H, W] or batches of such, alone or as (images, targets), of which the first `count`
            calibrate, but three in four at most, and the others judge.
        points: that may be lost; None for 0.5, or 5 in agreement. task: what scores, with targets; None for
            classification. Without targets the model's own answers are the targets.

    Raises:
        ExportError: no images, too few, of another shape, not finite; a model that images alone do not feed, or that
            gives no classes and has no targets.
    """
    _check_fed_by_images(subject)
    fixed = subject.call.tensors[0].shape[0] if subject.dynamic == NONE else None
    if given is None:
        raise ExportError(
            "8 bits need images to take ranges from: give calibration=, a tensor [N, C, H, W] or batches of images as "
            "the model takes them, with targets or without; the folder of a run brings its own"
        )
    metric = CLASSIFICATION.metric if task is None else task.metric
    if isinstance(given, DataBundle):
        images = torch.cat([x for x, _ in given.calibration_loader(count)])[:count]
        wanted = -(-_MOST_JUDGED // given.config.val_batch_size)
        loader = _held_out(given)
        held_out: Iterable[Batch] = Batches(lambda: itertools.islice(iter(loader), wanted), wanted)
        number = sum(len(x) for x, _ in held_out)
        if fixed is not None:
            held_out = _in_batches_of(fixed, held_out)
            number -= number % fixed
            images = images[: len(images) // fixed * fixed]
    else:
        everything, targets = _taken(given, count + _MOST_KEPT)
        everything = everything[: len(everything) // (fixed or 1) * (fixed or 1)]
        first = min(count, len(everything) * 3 // 4) // (fixed or 1) * (fixed or 1)
        images, others = everything[:first], everything[first:]
        if targets is None:
            task, targets = AGREEMENT, _answers(subject, everything, fixed or _BATCH)
            metric, points = "agreement with the model", _POINTS_OF_AGREEMENT if points is None else points
        targets, size = targets[first : len(everything)], fixed or _BATCH
        held_out, number = list(zip(others.split(size), targets.split(size), strict=True)), len(others)
    points = _POINTS if points is None else points
    if len(images) < LEAST_IMAGES:
        raise ExportError(
            f"{len(images)} images are too few to take ranges from: give {LEAST_IMAGES} at least, better 300"
        )
    _check_images(images, subject)
    if number < 100 / points:
        raise ExportError(
            f"a loss of {points:g} points cannot be seen on {number} images: to judge by, {math.ceil(100 / points)} "
            f"are needed beside those that calibrate. Give more, or allow more points ({100 / max(number, 1):.2g})"
        )
    return Samples(images.split(fixed or 1), held_out, number, task or CLASSIFICATION, metric, points)


def _held_out(given: DataBundle) -> Batches:
    try:
        return given.holdout_loader()
    except DataError as error:
        raise ExportError(
            f"8 bits are judged by images that are held out, and {given.config.data} has none (holdout is "
            f"{given.config.holdout}): give calibration= images, of which some are kept to judge by"
        ) from error


def _check_fed_by_images(subject: Subject) -> None:
    tensors = subject.call.tensors
    if len(tensors) != 1 or tensors[0].dim() != 4 or tensors[0].dtype != torch.float32:
        taken = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors)
        raise ExportError(
            f"8 bits are for models that take one float32 tensor of images, and {subject.name()} takes {taken}"
        )


def _taken(given: Tensor | Iterable[Any], most: int) -> tuple[Tensor, Tensor | None]:
    """The first images of what a user gives, and their targets where all batches have such."""
    batches = [given] if isinstance(given, Tensor) else given
    images: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in batches:
        x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        if (
            not isinstance(x, Tensor)
            or x.dim() != 4
            or len(rest) > 1
            or not all(isinstance(t, Tensor) for t in rest)
        ):
            raise ExportError(
                f"calibration gives a {type(batch).__name__}, expected images [N, C, H, W], or (images, targets) as "
                "tensors"
            )
        images.append(x.detach().cpu())
        targets += [t.detach().cpu() for t in rest]
        if sum(map(len, images)) >= most:
            break
    if not images:
        raise ExportError("calibration gives no images")
    if targets and len(targets) != len(images):
        raise ExportError("calibration gives targets with some of its batches and none with others")
    shapes = {tuple(x.shape[1:]) for x in images}
    if len(shapes) > 1:
        raise ExportError(f"calibration gives images of several sizes, {sorted(shapes)}: resize them to one")
    return torch.cat(images)[:most], torch.cat(targets)[:most] if targets else None


def _check_images(images: Tensor, subject: Subject) -> None:
    expected = subject.call.tensors[0]
    channels = expected.shape[1] == images.shape[1]
    if not channels or (subject.dynamic != SIZES and images.shape[1:] != expected.shape[1:]):
        raise ExportError(
            f"images {list(images.shape[1:])} are given to calibrate by, and {subject.name()} is exported for "
            f"{list(expected.shape[1:])}"
        )
    if images.dtype != torch.float32:
        raise ExportError(
            f"images of {images.dtype} are given to calibrate by, expected torch.float32, normalised"
        )
    wrong = (~images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        raise ExportError(
            f"{len(wrong)} of the images to calibrate by hold NaN or infinity, first number {wrong[0]}: no range "
            "can be taken from them; leave them out"
        )


@torch.no_grad()
def _answers(subject: Subject, images: Tensor, size: int) -> Tensor:
    """The class that the model gives each image. Raises ExportError where it gives none."""
    _check_images(images, subject)
    answers = []
    for x in images.split(size):
        output = AGREEMENT.read(subject.model(x))
        if output.dim() != 2 or output.shape[1] < 2:
            raise ExportError(
                f"{subject.name()} gives {list(output.shape)}, which names no class for an image, so that nothing can "
                "be said without targets: give (images, targets) to calibrate by, and task="
            )
        answers.append(output.argmax(1))
    return torch.cat(answers)


def _in_batches_of(size: int, batches: Iterable[Batch]) -> Batches:
    """Batches of exactly one size; what is left over is dropped."""

    def made() -> Iterator[Batch]:
        kept: list[Tensor] = []
        for pair in batches:
            kept = [torch.cat([a, b]) for a, b in zip(kept, pair, strict=True)] if kept else list(pair)
            while len(kept[0]) >= size:
                yield kept[0][:size], kept[1][:size]
                kept = [x[size:] for x in kept]

    return Batches(made, 0)
