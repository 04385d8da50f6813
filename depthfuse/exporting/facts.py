"""What a file says about the model in it: how its input is made, what its outputs mean, where it comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse._version import __version__
from depthfuse.errors import ExportError
from depthfuse.exporting.subject import Subject

FORMAT = "depthfuse.export/1"
KEY = "depthfuse"  # by which each runtime's file holds the facts, as JSON


def feeding_of(model: nn.Module) -> dict[str, Any]:
    """What timm says of a model's input and classes; {} of a model that is not its."""
    for holder in model.modules():
        config = getattr(holder, "pretrained_cfg", None) or getattr(holder, "default_cfg", None)
        if isinstance(config, dict):
            return {
                "mean": config.get("mean"),
                "std": config.get("std"),
                "classes": config.get("label_names"),
            }
    return {}


def facts_of(
    subject: Subject,
    known: dict[str, Any],
    classes: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, Any]:
    """The document, of plain values; None for what nobody knows.

    Args:
        known: what the run, or timm, says: see `depthfuse.runs.feeding`. classes, mean, std: the user's own, which win.

    Raises:
        ExportError: as many names or numbers are given as the model does not have outputs or channels.
    """
    image = next((x for x in subject.call.tensors if x.dim() == 4), None)
    channels = None if image is None else image.shape[1]
    shape = subject.output_shapes()[0]
    answers = shape[1] if len(shape) > 1 else None
    source, spec = subject.plan.source, getattr(subject.model, "depthfuse_spec", None)
    return {
        "format": FORMAT,
        "depthfuse": __version__,
        "torch": torch.__version__,
        "model": subject.name() if source is None else source.name,
        "model_kwargs": {} if source is None else source.kwargs,
        "precision": str(subject.plan.dtype).removeprefix("torch."),
        "spec": None if spec is None else json.loads(spec.to_json()),
        "inputs": _described(subject.input_names(), subject.call.tensors, subject.open_axes()),
        "outputs": subject.output_names(),
        "input_size": None if image is None else list(image.shape[1:]),
        "mean": _fitting("mean", mean, known.get("mean"), channels, "channels"),
        "std": _fitting("std", std, known.get("std"), channels, "channels"),
        "classes": _fitting("classes", classes, known.get("classes"), answers, "outputs"),
    }


def _fitting(
    name: str, given: Sequence[Any] | None, known: Sequence[Any] | None, count: int | None, of_what: str
) -> list[Any] | None:
    if given is not None and len(given) != count:
        raise ExportError(
            f"{name} has {len(given)} entries, and the model has {count} {of_what}: give one for each"
        )
    chosen = known if given is None else given
    return list(chosen) if chosen is not None and len(chosen) == count else None


def _described(
    names: Sequence[str], tensors: Sequence[Tensor], open_axes: Sequence[dict[int, str]]
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": [axes.get(axis, size) for axis, size in enumerate(x.shape)],
            "dtype": str(x.dtype).removeprefix("torch."),
        }
        for name, x, axes in zip(names, tensors, open_axes, strict=True)
    ]
