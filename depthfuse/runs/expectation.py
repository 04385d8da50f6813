"""How long a run will take, told before it starts: a few steps are timed, and those of all stages are counted."""

from __future__ import annotations

import dataclasses
import logging

import torch
from accelerate import Accelerator
from torch import nn

from depthfuse.config import PruneConfig, SearchConfig, TrainConfig
from depthfuse.data import DataBundle
from depthfuse.errors import DataError
from depthfuse.measuring.timing import time_interleaved
from depthfuse.merging.supernet import Supernet
from depthfuse.runs import finalists
from depthfuse.runs.weights import unfit_given
from depthfuse.searching.space import SearchSpace, budget_unit
from depthfuse.searching.strategies import find_strategy
from depthfuse.spec import ModelSource
from depthfuse.tasks import Task
from depthfuse.training.evaluation import in_eval_mode
from depthfuse.training.objectives import Objective

log = logging.getLogger(__name__)

_ARTEFACTS = {
    "baseline": "baseline.safetensors",
    "supernet": "supernet.safetensors",
    "search": "subnet.json",
    "finetune": "finetune.safetensors",
    "compare": "results.json",
}
_NETS_COMPARED = 5


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds an image takes on this machine, of the whole net: in a step of training, and forward alone."""

    training: float
    forward: float


def measure_pace(net: nn.Module, objective: Objective, data: DataBundle, device: torch.device) -> Pace:
    """Times a training step and a forward pass of one training batch. The net is left with gradients."""
    images, targets = next(iter(data.train_loader(seed=0, epoch=0)))
    images, targets = images.to(device, memory_format=torch.channels_last), targets.to(device)
    if not data.labelled:
        targets = targets.clamp(min=0)
    net = net.to(device, memory_format=torch.channels_last)

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():  # the timer takes both away
            objective(images, targets, 0.0).backward()

    def forward() -> None:
        with torch.no_grad():
            net(images)

    with in_eval_mode(net):  # leaves the statistics of batch norms alone, and takes as long
        times = time_interleaved(
            {"step": step, "forward": forward}, rounds=1, min_round_ms=1.0, warmup=1, device=device
        )
    return Pace(*(times[name].least_ms / 1e3 / len(images) for name in ("step", "forward")))


def expected_seconds(
    config: PruneConfig, data: DataBundle, source: ModelSource, pace: Pace, until: str, processes: int = 1
) -> dict[str, float]:
    """{stage: seconds} of the stages up to `until` that are not done yet, but for the latency table.

    Reading images from a disk is not in it. processes: that train together.
    """
    batches, size = data.train_batches(processes), data.config.batch_size
    held = _held_out(data)

    def training(settings: TrainConfig, step: float, scores: int = 1) -> float:
        return settings.epochs * (batches * size * step + scores * held * pace.forward)

    supernet = Supernet(source.build())
    options = supernet.options()
    calibrating = config.search.calibration_images * pace.forward
    subnets = 2 + config.supernet.random_subnets
    given = config.weights is not None or config.pretrained
    taught = config.finetune.distill or config.finetune.features
    taught_step = pace.training + (pace.forward if taught else 0.0)
    finalist = training(finalists.short(config.finetune, config.search), taught_step)
    decides = config.train and config.search.finalists > 1 and budget_unit(config.search) is not None
    seconds = {
        "baseline": 0.0
        if given and not unfit_given(source, config.weights, config.pretrained)
        else training(config.baseline, pace.training),
        # each block is run up to, and its candidates are fitted and judged
        "supernet": len(options) * calibrating
        if config.start == "fit"
        else training(config.supernet, subnets * pace.training, scores=2),
        "search": _scored(options, config.search) * (calibrating + held * pace.forward)
        + (config.search.finalists * finalist if decides else 0.0),
        "finetune": training(config.finetune, taught_step) if config.train else len(options) * calibrating,
        "compare": _NETS_COMPARED * len(data.val_loader()) * data.config.val_batch_size * pace.forward,
    }
    return {stage: seconds[stage] for stage in left(config, until)}


def left(config: PruneConfig, until: str) -> list[str]:
    """The stages up to `until` that are not done yet, but for merging, which takes no time."""
    stages = list(_ARTEFACTS)
    wanted = stages[: stages.index("finetune" if until == "merge" else until) + 1]
    artefacts = _ARTEFACTS if budget_unit(config.search) else _ARTEFACTS | {"search": "front.csv"}
    return [stage for stage in wanted if not (config.out / artefacts[stage]).exists()]


def _held_out(data: DataBundle) -> int:
    """About how many images; 0 where there are none, which the stages that need them will say."""
    try:
        return len(data.holdout_loader()) * data.config.val_batch_size
    except DataError:
        return 0


def _scored(options: dict[str, list[str]], search: SearchConfig) -> int:
    """About how many subnets the search scores: at most, as merges that do not pay are left out of it later."""
    plain = dataclasses.replace(
        search, blocks=1, budget_ms=None, speedup=None, macs=None, parameters=None, points=None, force=()
    )
    return find_strategy(search.strategy).count(SearchSpace(options, plain), search)


def tell(
    config: PruneConfig,
    data: DataBundle,
    source: ModelSource,
    task: Task,
    accelerator: Accelerator,
    until: str,
) -> None:
    """Log how long the stages up to `until` will take, where anything is left to do and anybody reads it."""
    if not log.isEnabledFor(logging.INFO) or not accelerator.is_main_process or not left(config, until):
        return
    net = source.build()
    pace = measure_pace(net, Objective(net, task=task), data, accelerator.device)
    seconds = expected_seconds(config, data, source, pace, until, accelerator.num_processes)
    expected = {stage: s for stage, s in seconds.items() if s}
    if expected:
        parts = ", ".join(f"{stage} {duration(s)}" for stage, s in expected.items())
        log.info(
            "expected: about %s (%s), and what measuring latencies takes",
            duration(sum(expected.values())),
            parts,
        )


def duration(seconds: float) -> str:
    """40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
