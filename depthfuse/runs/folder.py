"""A run's folder: whether it is free, and what it takes over from another run of the same settings (`start_from`)."""

from __future__ import annotations

from depthfuse.checkpoint import copy_file, save_text
from depthfuse.config import PruneConfig, load_yaml, to_dict, to_yaml
from depthfuse.data import DataBundle
from depthfuse.errors import ConfigError
from depthfuse.runs.feeding import load_feeding, save_feeding

# The settings that what is taken over depends on; of `search`, how many images batch norms are estimated from.
_SAME = (
    "model",
    "task",
    "model_kwargs",
    "pretrained",
    "weights",
    "data",
    "baseline",
    "supernet",
    "start",
    "seed",
)


def claim(config: PruneConfig) -> None:
    """Check that `config.out` is free, or holds a run with the same config. Raises ConfigError where it does not."""
    path = config.out / "config.yaml"
    if path.exists():
        here, there = to_dict(config), to_dict(load_yaml(path, complete=True))
        ignored = ("out", "checkpoint_seconds")
        differing = [k for k in here if k not in ignored and here[k] != there.get(k)]
        if differing:
            raise ConfigError(
                f"{config.out} holds a run with another configuration ({', '.join(differing)} differ): "
                "choose another --out, or delete that folder to start over"
            )


def take(config: PruneConfig, data: DataBundle) -> None:
    """Take a free folder: what another run has worked out, what a net is fed, and the resolved config."""
    if load_feeding(config.out) is None:  # also where a run of an earlier version goes on
        save_feeding(config.out, data)
    if not (config.out / "config.yaml").exists():
        _take_over(config)
        save_text(config.out / "config.yaml", to_yaml(config))


def _take_over(config: PruneConfig) -> None:
    """Copy what another run (`config.start_from`) has already worked out into `config.out`, where it is not there.

    Raises ConfigError where that run differs.
    """
    start = config.start_from
    if start is None:
        return
    here, there = to_dict(config), to_dict(load_yaml(start / "config.yaml", complete=True))
    differing = [name for name in _SAME if here[name] != there[name]]
    if here["search"]["calibration_images"] != there["search"]["calibration_images"]:
        differing.append("search.calibration_images")
    if differing:
        raise ConfigError(
            f"cannot start from {start}: {', '.join(differing)} differ there. Give the same settings, or leave "
            "start_from out"
        )
    weights = (f"{stem}.safetensors" for stem in ("baseline", "answers", "supernet"))
    for name in ("latency.json", *weights, "search.jsonl"):
        if (start / name).exists() and not (config.out / name).exists():
            copy_file(start / name, config.out / name)
