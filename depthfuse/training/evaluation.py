"""Scoring a net on images, and re-estimating its batch norm statistics before that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from depthfuse.data import DataBundle
from depthfuse.errors import TaskError, TrainingDiverged
from depthfuse.merging.supernet import recalibrate
from depthfuse.tasks import CLASSIFICATION, Score, Task
from depthfuse.untrusted import is_out_of_memory


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode after."""
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


@torch.no_grad()
def evaluate(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator | None = None,
    task: Task = CLASSIFICATION,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Score:
    """Metric and loss of a net, in eval mode, over all processes; without an accelerator this process scores all.

    batches: (images [N, C, H, W], targets of the task), all of them and the same in every process: they are divided
    here, and nowhere else. watch: is shown each (output as the task reads it, targets) of this process. Raises
    ValueError for no images.
    """
    device = next(itertools.chain(net.parameters(), net.buffers())).device
    divided = accelerator if task.divisible else None
    counts: list[Tensor] = []
    with in_eval_mode(net):
        for index, (images, targets) in enumerate(batches):
            if divided is not None and index % divided.num_processes != divided.process_index:
                continue
            output, wanted = task.read(net(images.to(device))), targets.to(device)
            found = task.measure(output, wanted).double()
            if watch is not None:
                watch(output, wanted)
            if task.divisible and counts:
                counts[0] = counts[0] + found
            else:
                counts.append(found)
    whole = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.float64, device=device)
    if divided is not None:
        # a process that had no batch does not know how many numbers the others have
        length = int(divided.gather(torch.tensor([len(whole)], device=device)).max())
        whole = divided.reduce(F.pad(whole, (0, length - len(whole))), reduction="sum")
    if not len(whole):
        raise ValueError("cannot score a net on no images")
    return task.score(whole)


def check_task(task: Task, net: nn.Module, data: DataBundle) -> None:
    """Run two images through a net and its loss, before hours are spent.

    Raises TaskError where the net's output or the data's targets are not what the task takes, or the loss has no
    gradient; TrainingDiverged where outputs are finite and the loss is not.
    """
    images, targets = next(iter(data.calibration_loader(2)))
    device = next(net.parameters()).device
    images, targets = images.to(device), targets.to(device)
    if not data.labelled:  # the net's own answers come later: any class of it does here
        targets = targets.clamp(min=0)
    with in_eval_mode(net):
        try:
            given = net(images)
        except Exception as error:  # the model's own code may raise anything
            if is_out_of_memory(error):
                raise
            raise TaskError(
                f"the model does not take images {list(images.shape)} of this data ({type(error).__name__}: {error})"
            ) from error
        output = task.read(given)
        task.check(output, targets, data.num_classes)
        loss = task.loss(output, targets)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        kind = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(f"the loss of {task.name} is {kind}, expected a single number with a gradient")
    if bool(torch.isfinite(output).all()) and not bool(torch.isfinite(loss)):
        raise TrainingDiverged(
            f"the loss of {task.name} is {loss.item()} on the first images already, of outputs that are finite: "
            "correct the task or its targets"
        )


def top1(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator | None = None
) -> float:
    """Share of images classified right, in percent; see `evaluate`."""
    return evaluate(net, batches, accelerator).top1


def calibrate(net: nn.Module, data: DataBundle, images: int) -> None:
    """Re-estimate batch norm statistics on about `images` fixed training images; none leaves them alone.

    Augmented, as in training: the weights were trained beside the statistics of such images. On EfficientNet-Lite0 and
    Caltech-101 those of plain ones take 2.5 points from a net that nothing was pruned of, and these take none.
    """
    if images == 0:
        return
    device = next(net.parameters()).device
    count = max(1, round(images / data.config.batch_size))
    batches = itertools.islice(data.train_loader(seed=0, epoch=0), count)
    recalibrate(net, (batch.to(device) for batch, _ in batches))
