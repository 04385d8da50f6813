"""The data and the task of a finished run, for what comes after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from depthfuse.checkpoint import load_tensors
from depthfuse.config import load_yaml
from depthfuse.data import DataBundle, open_data
from depthfuse.merging.model_inputs import input_size
from depthfuse.runs.answers import give
from depthfuse.runs.feeding import load_feeding
from depthfuse.runs.weights import CLASSES
from depthfuse.spec import SubnetSpec
from depthfuse.tasks import AGREEMENT, Task, find_task


def reopen(folder: Path) -> tuple[DataBundle, Task]:
    """What a run was trained on and scored by; images without classes have the original net's answers.

    Raises:
        DataError: the data is no longer where the run found it. ConfigError, CheckpointError, SpecError, TaskError: a
            file of the run's is missing or damaged.
    """
    config = load_yaml(folder / "config.yaml", complete=True)
    source = SubnetSpec.load(folder / "subnet.json").source
    task, model = find_task(config.task), source.build()
    told = load_feeding(folder)
    channels, size = (
        (told["input_size"][:2]) if told is not None else (input_size(model)[0], config.data.img_size)
    )
    data = open_data(
        dataclasses.replace(config.data, img_size=size),
        num_classes=source.kwargs.get(CLASSES) if task.by_class else None,
        in_chans=channels,
        model_cfg=getattr(model, "pretrained_cfg", None),
        targets=task.targets,
    )
    if data.labelled:
        return data, task
    answers, _ = load_tensors(folder / "answers.safetensors")
    return give(data, answers, folder / "answers.safetensors"), AGREEMENT
