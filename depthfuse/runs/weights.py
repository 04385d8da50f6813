"""Weights on their way into a model: those of a run, and a user's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from depthfuse.checkpoint import load_foreign_tensors, load_tensors
from depthfuse.errors import CheckpointError
from depthfuse.merging.merge import check_same_shapes, load_merged
from depthfuse.spec import SubnetSpec


def load_strictly(net: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict. Raises CheckpointError that names the file where it is of another model."""
    check_same_shapes(net.state_dict(), tensors, path)
    net.load_state_dict(tensors)


def read_weights(path: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict from anybody's safetensors file. Raises CheckpointError for any other or damaged file."""
    try:
        tensors = load_foreign_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot read weights from {path} (a safetensors file is expected): {error}"
        ) from error
    check_same_shapes(model.state_dict(), tensors, path)
    return tensors


def load(directory: str | Path) -> nn.Module:
    """Rebuild the merged model of a finished run, in eval mode on the CPU, from subnet.json and merged.safetensors.

    Raises CheckpointError for files that are missing, damaged or of another model, SpecError for a spec that does not
    fit the model it names.
    """
    directory = Path(directory)
    spec = SubnetSpec.load(directory / "subnet.json")
    tensors, _ = load_tensors(directory / "merged.safetensors")
    return load_merged(spec, tensors, directory / "merged.safetensors")
