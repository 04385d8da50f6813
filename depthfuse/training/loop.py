"""One training loop for all stages. Each iteration's randomness is a function of (seed, iteration), and the data's of
(seed, epoch, image), so a run that was killed and started again ends with the same bits as one that was not."""

from __future__ import annotations

import atexit
import csv
import functools
import io
import logging
import math
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
from depthfuse.training.evaluation import calibrate, evaluate
from depthfuse.training.memory import keep_freed_memory
from depthfuse.training.objectives import Objective
from depthfuse.training.processes import on_all, on_one, share_buffers
from depthfuse.untrusted import MALFORMED

log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What `fit` leaves: the history, one row an evaluation and a few an epoch for the loss, and the score of the
    weights that it ends with."""

    history: list[dict[str, Any]] = field(default_factory=list)
    top1: float | None = None  # the task's metric in percent, on held-out training images
    seconds: float = 0.0  # wall time, of all processes that had a part in it one after another


def make_accelerator(amp: str = "no", cpu: bool = False) -> Accelerator:
    """Device placement, mixed precision and data parallelism; started by torchrun it spans all processes."""
    # which switches a step uses is drawn at random, so some parameters have no gradient in some steps
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # the others wait while the first process measures latencies and searches
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))
    accelerator = Accelerator(mixed_precision=amp, cpu=cpu, kwargs_handlers=[unused, patient])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.num_processes > 1:
        atexit.register(_leave_the_others)
    return accelerator


def _leave_the_others() -> None:
    """Ends the process group. Left to the end of the interpreter, its threads may abort a process that is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
    """Train `objective.net` in place.

    It ends with the weights of the latest epoch whose score on the held-out images is within chance of the best
    (`within_chance`), or the last, where none may be chosen. The highest score is mostly luck, of an epoch whose
    learning rate had not come down yet: with 300 held-out images it cost up to 1.0 points of top-1 on 2,610 others
    (benchmarks/results/studies.md).

    With `checkpoint`, the state is saved there about every `checkpoint_seconds` and after each epoch, and training
    goes on from it if it is there. Raises TrainingDiverged, naming iteration and layer, when loss or gradient is not
    finite in any process, and CheckpointError for a checkpoint of another run or number of processes.
    """
    training = _Training(
        objective,
        data,
        config,
        accelerator or make_accelerator(),
        stage=stage,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        calibration_images=calibration_images,
    )
    training.restore()
    training.run()
    return training.finish()


class _Training:
    """One training stage under way: what changes from step to step, and the parts of `fit`, whose arguments it has."""

    def __init__(
        self,
        objective: Objective,
        data: DataBundle,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        stage: str,
        seed: int,
        checkpoint: Path | None,
        checkpoint_seconds: float,
        calibration_images: int,
    ) -> None:
        data = data.batched(config.batch_size)
        self.objective, self.data, self.config, self.accelerator = objective, data, config, accelerator
        self.task = objective.task
        self.stage, self.seed, self.calibration_images = stage, seed, calibration_images
        self.checkpoint, self.checkpoint_seconds = checkpoint, checkpoint_seconds
        # oneDNN and cuDNN train convolutions faster in channels_last; images follow in `_step`
        self.net = objective.net.to(accelerator.device, memory_format=torch.channels_last)
        optimizer = create_optimizer_v2(
            self.net, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay
        )
        self.ema = ModelEmaV3(self.net, decay=config.ema_decay) if config.ema_decay > 0 else None
        self.wrapped, self.optimizer = accelerator.prepare(objective, optimizer)
        self.epoch_batches = data.train_batches(accelerator.num_processes)
        self.total = config.epochs * self.epoch_batches
        self.warmup = min(round(config.warmup_epochs * self.epoch_batches), max(self.total - 1, 0))
        self.hold = min(round(config.hold_share * self.total), max(self.total - 1 - self.warmup, 0))
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(self.total - self.hold, 1),
            lr_min=config.min_lr,
            warmup_t=self.warmup,
            warmup_lr_init=config.min_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.mixup = data.mixup()  # without label smoothing, which the objective does
        self.result, self.iteration = TrainResult(), 0
        self.kept: dict[str, Tensor] | None = None  # the weights to end with, as far as is known
        self.best_top1, self.held_out = -math.inf, 0
        self.started = self.last_saved = time.monotonic()

    def restore(self) -> None:
        """Go on from the checkpoint, if it is there. Raises CheckpointError for one of another run."""
        checkpoint = self.checkpoint
        if checkpoint is None or not on_one(self.accelerator, checkpoint.exists):
            return
        state = on_all(self.accelerator, lambda: _load_state(checkpoint, self._identity()))
        scaler = self.accelerator.scaler
        try:
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
            self.iteration, self.kept = state["iteration"], state["kept"]
            self.best_top1 = state["best_top1"]
            self.result = TrainResult(state["history"], state["top1"], state["seconds"])
        except MALFORMED as error:
            raise CheckpointError(
                f"{checkpoint} is no training state of this version ({type(error).__name__} {error!s:.200}): delete it "
                "to start this stage over"
            ) from error
        log.info("%s: going on from iteration %d of %d", self.stage, self.iteration, self.total)

    def run(self) -> None:
        """All steps that are left, an evaluation after each epoch."""
        self.wrapped.train()
        with progress(self.stage, total=self.total, done=self.iteration) as bar:
            while self.iteration < self.total:
                epoch, start_batch = divmod(self.iteration, self.epoch_batches)
                loader = self.data.train_loader(
                    seed=self.seed,
                    epoch=epoch,
                    start_batch=start_batch,
                    rank=self.accelerator.process_index,
                    world_size=self.accelerator.num_processes,
                )
                batches = iter(loader)
                for _ in range(start_batch, self.epoch_batches):
                    fetch = functools.partial(self._save_and_fetch, batches)
                    loss = self._step(*on_all(self.accelerator, fetch))
                    bar.advance(1, loss=loss, **self.objective.status((self.iteration - 1) / self.total))
                self._end_epoch(epoch)

    def finish(self) -> TrainResult:
        """Put the weights to end with into the net."""
        self.result.seconds += time.monotonic() - self.started
        if self.kept is not None:
            self.net.load_state_dict(self.kept)
        elif self.ema is not None:
            self.net.load_state_dict(self.ema.module.state_dict())
        return self.result

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be this stage's."""
        return {
            "stage": self.stage,
            "seed": self.seed,
            "total": self.total,
            "processes": self.accelerator.num_processes,
            "parameters": sum(p.numel() for p in self.net.parameters()),
        }

    def _save(self) -> None:
        self.last_saved = time.monotonic()
        if self.checkpoint is None:
            return
        scaler = self.accelerator.scaler
        state = {
            "identity": self._identity(),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "iteration": self.iteration,
            **self.objective.status(self.iteration / self.total),
            "history": self.result.history,
            "kept": self.kept,
            "top1": self.result.top1,
            "best_top1": self.best_top1,
            "seconds": self.result.seconds + time.monotonic() - self.started,
        }
        save_state(self.checkpoint, state)

    def _save_and_fetch(self, batches: Iterator[Batch]) -> Batch:
        # at the end of an epoch evaluation comes first, and saving after it
        waited = time.monotonic() - self.last_saved > self.checkpoint_seconds
        if self.iteration % self.epoch_batches and waited and self.accelerator.is_main_process:
            self._save()
        batch = next(batches, None)
        if batch is None:
            epoch = self.iteration // self.epoch_batches
            raise RuntimeError(
                f"{self.stage}: the data gave fewer batches in epoch {epoch} than the {self.epoch_batches} announced"
            )
        return batch

    def _step(self, images: Tensor, targets: Tensor) -> float:
        """One optimiser step; returns the loss."""
        accelerator, config, iteration = self.accelerator, self.config, self.iteration
        seed_iteration(self.seed, iteration, accelerator.process_index)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets, seed=self.seed, iteration=iteration)
        images = images.to(accelerator.device, non_blocking=True, memory_format=torch.channels_last)
        targets = targets.to(accelerator.device, non_blocking=True)
        held = iteration if iteration < self.warmup else max(self.warmup, iteration - self.hold)
        self.scheduler.step_update(held)
        self.optimizer.zero_grad(set_to_none=True)
        with accelerator.autocast():
            loss = self.wrapped(images, targets, iteration / self.total)
        check = functools.partial(_check_finite, loss, self.net, images, iteration, self.stage)
        on_all(accelerator, check)  # one process has the images at fault, and all have to end
        accelerator.backward(loss)
        if config.clip_grad > 0:
            accelerator.unscale_gradients()
            norm = get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
            if accelerator.scaler is None:  # a gradient scaler skips overflowing steps by itself
                _check_gradient(norm, self.net, iteration, self.stage)
            clip_grads_with_norm_(self.net.parameters(), config.clip_grad, norm)
        self.optimizer.step()
        self.iteration += 1
        if self.ema is not None:
            self.ema.update(self.net, step=self.iteration)
        loss_value = float(loss.detach())
        log_every = max(1, self.epoch_batches // 10)
        if self.iteration % log_every == 0 or self.iteration == self.total:
            epoch = self.iteration / self.epoch_batches
            row = {"stage": self.stage, "iteration": self.iteration, "epoch": epoch}
            row |= {"loss": loss_value, "lr": self.optimizer.param_groups[0]["lr"]}
            self.result.history.append(row | self.objective.status(iteration / self.total))
        return loss_value

    def _end_epoch(self, epoch: int) -> None:
        """Score what would be shown, keep it if chance may have made others better, and save."""
        shown = self.net if self.ema is None else self.ema.module
        share_buffers(self.accelerator, shown)  # what is scored is what the main process saves
        metrics = self.objective.evaluate(
            shown,
            min(1.0, self.iteration / self.total),
            score=self._score,
            calibrate=lambda n: calibrate(n, self.data, self.calibration_images),
        )
        self.wrapped.train()
        done = {"iteration": self.iteration, "epoch": self.iteration // self.epoch_batches}
        self.result.history.append({"stage": self.stage, **done, **metrics})
        log.info("%s: epoch %d of %d: %s", self.stage, epoch + 1, self.config.epochs, _show(metrics))
        score = metrics.get(self.task.key)
        if score is not None and not math.isnan(score):
            self.best_top1 = max(score, self.best_top1)
            if within_chance(score, self.best_top1, self.held_out):
                self.result.top1 = score
                self.kept = {key: value.detach().cpu().clone() for key, value in shown.state_dict().items()}
        on_one(self.accelerator, self._save)

    def _score(self, net: nn.Module) -> float:
        """The task's metric on held-out images, in percent."""

        def counted() -> Iterator[Batch]:
            self.held_out = 0
            for images, targets in self.data.holdout_loader():
                self.held_out += len(images)
                yield images, targets

        return evaluate(net, counted(), self.accelerator, self.task).top1


def within_chance(score: float, best: float, images: int) -> bool:
    """Whether a score may be as good as the best one, both in percent, on as many images: within two standard errors.

    Of a share of images p the standard error is sqrt(p (1 - p) / images), and of any other mean of numbers from 0 to 1
    it is that at most (Bhatia and Davis, 2000).
    """
    share = min(max(best / 100.0, 0.0), 1.0)
    return score >= best - 200.0 * math.sqrt(share * (1.0 - share) / images)


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
