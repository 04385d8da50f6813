"""`depthfuse demo`: a small CNN and a small ViT through the whole job, on the embedded images, in minutes on a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from depthfuse.config import (
    FinetuneConfig,
    LatencyConfig,
    PruneConfig,
    SearchConfig,
    SupernetConfig,
    TrainConfig,
)
from depthfuse.data import DataConfig
from depthfuse.runs.run import prune

# Small enough to learn something in minutes on two cores: 4 and 6 million multiply-accumulates an image.
NETS = {
    "cnn": PruneConfig(
        model="resnet18",
        model_kwargs=("in_chans=1", "channels=(24,48,72,96)"),
        data=DataConfig(img_size=28, batch_size=128, val_batch_size=250),
        baseline=TrainConfig(epochs=6, lr=3e-3),
        supernet=SupernetConfig(epochs=2, lr=1e-3, warmup_epochs=0.5),
        search=SearchConfig(blocks=6, population=10, parents=4, generations=2),
        finetune=FinetuneConfig(epochs=6, lr=1e-3, warmup_epochs=0.5),
        latency=LatencyConfig(batch_size=32, rounds=15),
    ),
    "vit": PruneConfig(
        model="deit_tiny_patch16_224",
        model_kwargs=("in_chans=1", "img_size=28", "patch_size=7", "embed_dim=72", "num_heads=3", "depth=6"),
        data=DataConfig(img_size=28, batch_size=64, val_batch_size=250),
        baseline=TrainConfig(epochs=9, lr=1e-3),
        supernet=SupernetConfig(epochs=2, lr=5e-4, warmup_epochs=0.5),
        search=SearchConfig(blocks=5, population=10, parents=4, generations=2),
        finetune=FinetuneConfig(epochs=7, lr=1e-3, warmup_epochs=0.5),
        latency=LatencyConfig(batch_size=32, rounds=15),
    ),
}


def demo(out: Path) -> list[Path]:
    """Run both nets under `out`; returns their folders. Stopped and started again, it goes on where it was."""

    for name, config in NETS.items():
        prune(dataclasses.replace(config, out=out / name))
    return [out / name for name in NETS]
