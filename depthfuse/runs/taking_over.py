"""What a run takes over from another one of the same settings: `start_from`."""

from __future__ import annotations

from depthfuse.checkpoint import copy_file
from depthfuse.config import PruneConfig, load_yaml, to_dict
from depthfuse.errors import ConfigError

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


def take_over(config: PruneConfig) -> None:
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
