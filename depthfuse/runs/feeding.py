"""What a run's net is fed and what its classes are called, as a file: for whoever uses the net without the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from depthfuse.checkpoint import load_json, save_json
from depthfuse.data import DataBundle

FILE = "feeding.json"
# input_size: channels, height, width; mean, std: of each channel, on a scale where white is 1
FEEDING = {"classes": [str], "input_size": [int], "mean": [float], "std": [float]}


def save_feeding(folder: Path, data: DataBundle) -> None:
    """Raises CheckpointError where the file cannot be written."""
    document = {
        "classes": list(map(str, data.class_names)),
        "input_size": [data.in_chans, data.img_size, data.img_size],
        "mean": list(map(float, data.mean)),
        "std": list(map(float, data.std)),
    }
    save_json(folder / FILE, document)


def load_feeding(folder: Path) -> dict[str, Any] | None:
    """The document, or None for a run of a version that did not write it. Raises CheckpointError for a damaged one."""
    path = folder / FILE
    return load_json(path, FEEDING) if path.exists() else None
