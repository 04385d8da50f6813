"""What a MODEL on the command line stands for, and where it shall run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from depthfuse.checkpoint import load_json
from depthfuse.config import parse_model_kwargs
from depthfuse.costs.table import CostTable
from depthfuse.errors import ConfigError, UsageError
from depthfuse.merging.model_inputs import input_size
from depthfuse.origins import is_own
from depthfuse.runs.report import RESULTS
from depthfuse.runs.weights import load, read_weights
from depthfuse.spec import ModelSource

logger = logging.getLogger(__name__)


def named_source(name: str, model_kwargs: Sequence[str]) -> ModelSource:
    """A model by its name. Raises ConfigError for arguments that are not written name=value."""
    return ModelSource.make(name, **parse_model_kwargs(tuple(model_kwargs)))


def model_of(
    name: str, model_kwargs: Sequence[str], pretrained: bool, weights: Path | None
) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model by its name in evaluation mode on the CPU, and its input size (C, H, W). Random weights are said loudly.

    Raises UsageError for two sources of weights, ConfigError, SpecError or CheckpointError for what is not there.
    """
    from depthfuse.benching.bench import randomised

    if pretrained and weights is not None:
        raise UsageError("--pretrained and --weights are two sources of weights: give one of them")
    model = named_source(name, model_kwargs).build(pretrained=pretrained)
    if weights is not None:
        model.load_state_dict(read_weights(weights, model))
    elif not pretrained:
        logger.warning(
            "%s has RANDOM WEIGHTS: the file will be useless, but for its speed. Give --pretrained, or --weights FILE",
            name,
        )
        model = randomised(model)
    return model.eval(), input_size(model)


def run_folder(model: str) -> Path | None:
    """The folder of a run, where `model` is one. Raises ConfigError for a path at which there is none."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.name != model and not path.exists() and not is_own(model):
        raise ConfigError(f"there is no folder or file {model}: give the name of a model, or a run's folder")
    return None


def merged_model(folder: Path) -> tuple[nn.Module, tuple[int, int, int]]:
    """The merged model of a run, in evaluation mode on the CPU, and its input size (C, H, W)."""
    model = load(folder)
    # the closing comparison's, or, in a run that ends with the merge, those that the subnet was searched by
    results, table = folder / "results.json", folder / "latency.json"
    conditions = (
        load_json(results, RESULTS)["conditions"] if results.exists() else CostTable.load(table).conditions
    )
    channels, height, width = conditions["input_size"]
    return model, (channels, height, width)


def refuse_for(what: str, **flags: object) -> None:
    """Raise UsageError if any of these settings is given: it would be ignored."""
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value not in (None, False, ())]
    if given:
        raise UsageError(f"{', '.join(given)} cannot be given for {what}")


def require_positive(**counts: int) -> None:
    """Raise UsageError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {count}, expected 1 or more")


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; default the GPU where there is one. Raises ConfigError for one that is not here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    known = ", ".join(["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))])
    if name not in known.split(", "):
        raise ConfigError(f"there is no device {name!r} here; there are: {known}")
    return torch.device(name)
