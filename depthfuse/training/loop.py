"""One training loop for all stages. Each iteration's randomness is a function of (seed, iteration), and the data's of
(seed, epoch, image), so a run that was killed and started again ends with the same bits as one that was not."""

from __future__ import annotations

import csv
import functools
import io
import logging
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from depthfuse.checkpoint import load_state, save_state
from depthfuse.config import TrainConfig
from depthfuse.data.bundle import Batch, DataBundle
from depthfuse.errors import CheckpointError, TrainingDiverged
from depthfuse.log import progress
from depthfuse.training.evaluation import calibrate, top1
from depthfuse.training.objectives import Objective
from depthfuse.training.processes import on_all, on_one, share_buffers
from depthfuse.untrusted import MALFORMED

log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What `fit` leaves: the history, one row an evaluation and a few a epoch for the loss, and the best score."""

    history: list[dict[str, Any]] = field(default_factory=list)
    best_top1: float | None = None  # percent, on held-out training images
    seconds: float = 0.0  # wall time, of all processes that had a part in it one after another


def make_accelerator(amp: str = "no", cpu: bool = False) -> Accelerator:
    """Device placement, mixed precision and data parallelism; started by torchrun it spans all processes."""
    # which switches a step uses is drawn at random, so some parameters have no gradient in some steps
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # the others wait while the first process measures latencies and searches
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))
    return Accelerator(mixed_precision=amp, cpu=cpu, kwargs_handlers=[unused, patient])


def seed_iteration(seed: int, iteration: int, rank: int = 0) -> None:
    """Set all global random states as a function of (seed, iteration, rank)."""
    mixed = int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def fit(
    objective: Objective,
    data: DataBundle,
    config: TrainConfig,
    accelerator: Accelerator | None = None,
    *,
    stage: str = "train",
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    calibration_images: int = 512,
) -> TrainResult:
    """Train `objective.net` in place; it ends with the best weights seen (or the last, where none may be chosen).

    With `checkpoint`, the state is saved there about every `checkpoint_seconds` and after each epoch, and training
    goes on from it if it is there. Raises TrainingDiverged, naming iteration and layer, when loss or gradient is not
    finite in any process, and CheckpointError for a checkpoint of another run or number of processes.
    """
    accelerator = accelerator or make_accelerator()
    device = accelerator.device
    # oneDNN and cuDNN train convolutions faster in channels_last; images follow below
    net = objective.net.to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(net, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay)
    ema = ModelEmaV3(net, decay=config.ema_decay) if config.ema_decay > 0 else None
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    world, rank = accelerator.num_processes, accelerator.process_index
    epoch_batches = data.train_batches(world)
    total = config.epochs * epoch_batches
    warmup = min(round(config.warmup_epochs * epoch_batches), max(total - 1, 0))
    hold = min(round(config.hold_share * total), max(total - 1 - warmup, 0))
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=max(total - hold, 1),
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=config.min_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    mixup = data.mixup()  # without label smoothing, which the objective does
    result, iteration, best = TrainResult(), 0, None
    identity = {
        "stage": stage,
        "seed": seed,
        "total": total,
        "processes": world,
        "parameters": sum(p.numel() for p in net.parameters()),
    }

    if checkpoint is not None and on_one(accelerator, checkpoint.exists):
        state = on_all(accelerator, lambda: _load_state(checkpoint, identity))
        try:
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            if ema is not None:
                ema.module.load_state_dict(state["ema"])
            if accelerator.scaler is not None and state["scaler"]:
                accelerator.scaler.load_state_dict(state["scaler"])
            iteration, best = state["iteration"], state["best"]
            result = TrainResult(state["history"], state["best_top1"], state["seconds"])
        except MALFORMED as error:
            raise CheckpointError(
                f"{checkpoint} is no training state of this version ({type(error).__name__} {error!s:.200}): delete it "
                "to start this stage over"
            ) from error
        log.info("%s: going on from iteration %d of %d", stage, iteration, total)

    started = last_saved = time.monotonic()

    def save() -> None:
        nonlocal last_saved
        last_saved = time.monotonic()
        if checkpoint is not None:
            state = {
                "identity": identity,
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.module.state_dict() if ema is not None else None,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "iteration": iteration,
                **objective.status(iteration / total),
                "history": result.history,
                "best": best,
                "best_top1": result.best_top1,
                "seconds": result.seconds + time.monotonic() - started,
            }
            save_state(checkpoint, state)

    def save_and_fetch(batches: Iterator[Batch]) -> Batch:
        # at the end of an epoch evaluation comes first, and saving after it
        due = iteration % epoch_batches and time.monotonic() - last_saved > checkpoint_seconds
        if due and accelerator.is_main_process:
            save()
        batch = next(batches, None)
        if batch is None:
            epoch = iteration // epoch_batches
            raise RuntimeError(
                f"{stage}: the data gave fewer batches in epoch {epoch} than the {epoch_batches} announced"
            )
        return batch

    log_every = max(1, epoch_batches // 10)
    wrapped.train()
    with progress(stage, total=total, done=iteration) as bar:
        while iteration < total:
            epoch, start_batch = divmod(iteration, epoch_batches)
            loader = data.train_loader(
                seed=seed, epoch=epoch, start_batch=start_batch, rank=rank, world_size=world
            )
            batches = iter(loader)
            for _ in range(start_batch, epoch_batches):
                images, targets = on_all(accelerator, functools.partial(save_and_fetch, batches))
                seed_iteration(seed, iteration, rank)
                if mixup is not None:
                    images, targets = mixup(images, targets, seed=seed, iteration=iteration)
                images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                targets = targets.to(device, non_blocking=True)
                scheduler.step_update(iteration if iteration < warmup else max(warmup, iteration - hold))
                optimizer.zero_grad(set_to_none=True)
                with accelerator.autocast():
                    loss = wrapped(images, targets, iteration / total)
                check = functools.partial(_check_finite, loss, net, images, iteration, stage)
                on_all(accelerator, check)  # one process has the images at fault, and all have to end
                accelerator.backward(loss)
                if config.clip_grad > 0:
                    accelerator.unscale_gradients()
                    norm = get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
                    if accelerator.scaler is None:  # a gradient scaler skips overflowing steps by itself
                        _check_gradient(norm, net, iteration, stage)
                    clip_grads_with_norm_(net.parameters(), config.clip_grad, norm)
                optimizer.step()
                iteration += 1
                if ema is not None:
                    ema.update(net, step=iteration)
                if iteration % log_every == 0 or iteration == total:
                    row = {"stage": stage, "iteration": iteration, "epoch": iteration / epoch_batches}
                    row |= {"loss": float(loss.detach()), "lr": optimizer.param_groups[0]["lr"]}
                    result.history.append(row | objective.status((iteration - 1) / total))
                bar.advance(1, loss=float(loss.detach()), **objective.status((iteration - 1) / total))
            shown = net if ema is None else ema.module
            share_buffers(accelerator, shown)  # what is scored is what the main process saves
            metrics = objective.evaluate(
                shown,
                min(1.0, iteration / total),
                score=lambda n: top1(n, data.holdout_loader(), accelerator),
                calibrate=lambda n: calibrate(n, data, calibration_images),
            )
            wrapped.train()
            result.history.append(
                {"stage": stage, "iteration": iteration, "epoch": iteration // epoch_batches, **metrics}
            )
            log.info("%s: epoch %d of %d: %s", stage, epoch + 1, config.epochs, _show(metrics))
            score = metrics.get("top1")
            if score is not None and (result.best_top1 is None or score > result.best_top1):
                result.best_top1 = score
                best = {key: value.detach().cpu().clone() for key, value in shown.state_dict().items()}
            on_one(accelerator, save)
    result.seconds += time.monotonic() - started
    if best is not None:
        net.load_state_dict(best)
    elif ema is not None:
        net.load_state_dict(ema.module.state_dict())
    return result


def _show(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def _load_state(checkpoint: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Raises CheckpointError where the state is of another run, or of another number of processes."""
    state = load_state(checkpoint)
    found = state.get("identity")
    if found == identity:
        return state
    there, here = found.get("processes") if isinstance(found, dict) else None, identity["processes"]
    if there is not None and there != here:
        raise CheckpointError(
            f"{checkpoint} is of a training on {there} process(es), and this run has {here}: go on with as many "
            f"(torchrun --nproc-per-node {there}), or delete the file to begin this stage again"
        )
    raise CheckpointError(
        f"{checkpoint} belongs to another run ({found}; this one is {identity}): "
        "choose another output folder or delete it"
    )


def _check_finite(loss: Tensor, net: nn.Module, images: Tensor, iteration: int, stage: str) -> None:
    if bool(torch.isfinite(loss.detach())):
        return
    layer = first_nonfinite_layer(net, images) or "none alone: the loss itself"
    raise TrainingDiverged(
        f"{stage}: the loss is {float(loss.detach())} at iteration {iteration}; first layer with such output: {layer}. "
        "Lower the learning rate, lengthen the lambda ramp, or clip gradients harder"
    )


def _check_gradient(norm: Tensor, net: nn.Module, iteration: int, stage: str) -> None:
    if bool(torch.isfinite(norm)):
        return
    named = ((name, p.grad) for name, p in net.named_parameters() if p.grad is not None)
    layer = next((name for name, grad in named if not bool(torch.isfinite(grad).all())), "unknown")
    raise TrainingDiverged(
        f"{stage}: the gradient is not finite at iteration {iteration}; first layer with such a gradient: {layer}. "
        "Lower the learning rate or lengthen the lambda ramp"
    )


@torch.no_grad()
def first_nonfinite_layer(net: nn.Module, images: Tensor) -> str | None:
    """The first layer, in order of execution, whose weights or output hold NaN or infinity on these images."""
    bad: list[str] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, _args: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else []
            tensors += list(module.parameters(recurse=False))
            if not bad and any(not bool(torch.isfinite(t).all()) for t in tensors):
                bad.append(name)

        return check

    handles = [m.register_forward_hook(hook(n)) for n, m in net.named_modules() if not list(m.children())]
    try:
        net(images)
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else None


def history_csv(history: list[dict[str, Any]]) -> str:
    """Rows of all stages as CSV; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return out.getvalue()
