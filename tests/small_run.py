"""The whole job in some seconds, on the embedded images: what tests of runs start from."""

import dataclasses
from pathlib import Path

import pytest
from fake_clock import Clock

from depthfuse import PruneConfig
from depthfuse.config import FinetuneConfig, LatencyConfig, SearchConfig, SupernetConfig, TrainConfig
from depthfuse.data import DataConfig
from depthfuse.runs.run import prune

CONFIG = PruneConfig(
    model="resnet18",
    model_kwargs=("channels=(8,12,16,24)", "layers=(1,1,1,1)", "in_chans=1"),
    data=DataConfig(max_train_images=640, batch_size=64, holdout=0.1),
    baseline=TrainConfig(epochs=1, lr=2e-3, warmup_epochs=0.0),
    supernet=SupernetConfig(epochs=1, warmup_epochs=0.0),
    search=SearchConfig(
        blocks=2, population=4, parents=2, generations=1, calibration_images=64, losing_merges=True
    ),
    finetune=FinetuneConfig(epochs=2, warmup_epochs=0.0),
    latency=LatencyConfig(rounds=3),
    cpu=True,
    checkpoint_seconds=0.0,
)


def undisturbed(config: PruneConfig, out: Path) -> Path:
    """The folder of a run that nobody disturbed. Its latencies are not measured: a busy machine changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        Clock().install(patch)
        prune(dataclasses.replace(config, out=out))
    return out
