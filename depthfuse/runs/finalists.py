"""The last round of a search: its best subnets, each trained for a short time.

Scores before training tell little of what training makes of a subnet. After one epoch each, the divergence of the
outputs from the original net's orders subnets nearly as a whole training does (benchmarks/results/studies.md). It is
taken on augmented training images, which are many; of the images held out there are few, and no labels are needed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from depthfuse.checkpoint import load_json, save_json
from depthfuse.config import FinetuneConfig, SearchConfig
from depthfuse.data import DataBundle
from depthfuse.searching.space import Choices
from depthfuse.tasks import Task
from depthfuse.training.evaluation import in_eval_mode
from depthfuse.training.processes import on_one

log = logging.getLogger(__name__)

FILE = "finalists.json"
# divergence and seconds are there once a finalist was trained
SHAPE = [
    {"choices": dict[str, str], "divergence?": float | Literal["nan", "inf", "-inf"], "seconds?": float},
]
_IMAGES = 1536
_TEMPERATURE = 1.0  # probabilities as they are
_WARMUP_EPOCHS = 0.1  # of one epoch a whole one would be all of it


def enter(path: Path, finalists: Sequence[Choices]) -> None:
    """Write down who they are, the best by score first."""
    save_json(path, [{"choices": dict(choices)} for choices in finalists])


def short(settings: FinetuneConfig, search: SearchConfig) -> FinetuneConfig:
    """How a finalist is trained: as the whole training, but for its length, and pruned at once."""
    warmup = min(settings.warmup_epochs, _WARMUP_EPOCHS * search.finalist_epochs)
    return dataclasses.replace(
        settings, epochs=search.finalist_epochs, warmup_epochs=warmup, lambda_schedule="none"
    )


def decide(
    path: Path,
    train: Callable[[Choices, str], tuple[nn.Module, float]],
    judge: Callable[[nn.Module], float],
    accelerator: Accelerator,
) -> Choices:
    """Train the finalists of a file, one after another, and return the one that diverges least from the original net.

    Args:
        path: what `enter` has written. What each came to goes there, too: those that have it are not trained again.
            Their checkpoints, which lie beside it by the names of the stages, are of no more use in the end, and go.
            The stages are named after it.
        train: (choices, name of the stage) -> (the trained subnet, seconds). All processes call it.
        judge: a subnet's divergence. One process calls it.
    """
    rows: list[dict[str, Any]] = on_one(accelerator, lambda: load_json(path, SHAPE))
    stages = [f"{path.stem}-{number}" for number in range(1, len(rows) + 1)]
    for stage, row in zip(stages, rows, strict=True):
        if "divergence" not in row:
            net, row["seconds"] = train(row["choices"], stage)

            def judged(net: nn.Module = net) -> float | str:
                found = judge(net)
                return found if math.isfinite(found) else str(found)

            row["divergence"] = on_one(accelerator, judged)
            on_one(accelerator, lambda: save_json(path, rows))
        pruned = " ".join(f"{block}={name}" for block, name in row["choices"].items())
        log.info("%s of %d: divergence %.4f, %s", stage, len(rows), float(row["divergence"]), pruned)

    def clear() -> None:
        for stage in stages:
            path.with_name(f"{stage}.state").unlink(missing_ok=True)

    on_one(accelerator, clear)
    return best(rows)["choices"]


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of least divergence, the first of equals; what is no number comes last."""

    def order(row: dict[str, Any]) -> float:
        found = float(row["divergence"])
        return math.inf if math.isnan(found) else found

    return min(rows, key=order)


@torch.no_grad()
def divergence(
    original: nn.Module, net: nn.Module, *, data: DataBundle, task: Task, seed: int, epoch: int
) -> float:
    """How far a net's outputs are from the original's, by `Task.taught`, the mean over augmented training images, as
    they are drawn for an epoch."""
    total, count = 0.0, 0
    with in_eval_mode(net), in_eval_mode(original):
        device = next(net.parameters()).device
        for images, _ in data.train_loader(seed=seed, epoch=epoch):
            images = images.to(device, memory_format=torch.channels_last)
            given, wanted = task.read(net(images)), task.read(original(images))
            total += float(task.taught(given, wanted, _TEMPERATURE)) * len(images)
            count += len(images)
            if count >= _IMAGES:
                break
    return total / count
