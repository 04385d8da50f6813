"""Scoring a net on images, and re-estimating its batch norm statistics before that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from depthfuse.data import DataBundle
from depthfuse.merging.supernet import recalibrate


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode after."""
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)


class Score(NamedTuple):
    """How well a net classifies some images."""

    top1: float  # percent
    loss: float  # mean cross-entropy, nats


@torch.no_grad()
def evaluate(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator | None = None
) -> Score:
    """Top-1 and loss of a net, in eval mode, over all processes; without an accelerator this process scores all.

    batches: (images [N, C, H, W], class indices [N]), all of them and the same in every process: they are divided here,
    and nowhere else. Raises ValueError for no images.
    """
    device = next(chain(net.parameters(), net.buffers())).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, loss, images
    with in_eval_mode(net):
        for index, (images, targets) in enumerate(batches):
            if accelerator is not None and index % accelerator.num_processes != accelerator.process_index:
                continue
            targets = targets.to(device)
            logits = net(images.to(device)).float()
            loss = F.cross_entropy(logits, targets, reduction="sum")
            right = (logits.argmax(-1) == targets).sum()
            sums += torch.stack([right, loss, torch.tensor(len(targets), device=device)])
    if accelerator is not None:
        sums = accelerator.reduce(sums, reduction="sum")
    right, loss, count = sums.tolist()
    if not count:
        raise ValueError("cannot score a net on no images")
    return Score(100.0 * right / count, loss / count)


def top1(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator | None = None
) -> float:
    """Share of images classified right, in percent; see `evaluate`."""
    return evaluate(net, batches, accelerator).top1


def calibrate(net: nn.Module, data: DataBundle, images: int) -> None:
    """Re-estimate batch norm statistics on `images` fixed training images, unaugmented; none leaves them alone."""
    if images == 0:
        return
    device = next(net.parameters()).device
    recalibrate(net, (batch.to(device) for batch, _ in data.calibration_loader(images)))
