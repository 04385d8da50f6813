"""Keep the files that this version writes, for `test_formats.py`: `python tests/keep_formats.py`.

One small run, and its merged model accelerated, in tests/formats/VERSION. Do it once for a version, before its release,
and again when a format gets a new number; folders of earlier versions stay.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from small_run import CONFIG, undisturbed

import depthfuse
from depthfuse.checkpoint import save_json, save_state

FORMATS = Path(__file__).resolve().parent / "formats"
KEPT = (
    *(
        "config.yaml",
        "feeding.json",
        "latency.json",
        "search.jsonl",
        "subnet.json",
        "merge.json",
        "results.json",
    ),
    *("history_baseline.json", "seconds_baseline.json", "merged.safetensors", "front.csv"),
)
STATE = {"step": 3, "rates": [0.1, float("inf")], "weights": {"layer": (torch.arange(4.0), None)}}
SMALL = dataclasses.replace(
    CONFIG,
    model_kwargs=("channels=(4,4,8,8)", "layers=(1,1,1,1)", "in_chans=1"),
    start="fit",
    train=False,
    search=dataclasses.replace(CONFIG.search, blocks=1, strategy="milp"),
)


def example() -> torch.Tensor:
    """[2, 1, 28, 28]; without a random generator, whose values another torch may change."""
    return torch.linspace(-1.0, 1.0, 2 * 28 * 28).sin().reshape(2, 1, 28, 28)


def outputs_of(model: torch.nn.Module) -> list[list[float]]:
    with torch.no_grad():
        return model(example()).tolist()


def keep(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # so that no path of this machine is written
        run = undisturbed(SMALL, Path("run"))
        folder.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(run / name, folder / name)
        model = depthfuse.load(run)
        depthfuse.accelerate(model, example(), tune="heuristic", engines="own").save(
            folder / "fast.safetensors"
        )
        save_state(folder / "baseline.state", STATE)
        save_json(folder / "expected.json", outputs_of(model))


if __name__ == "__main__":
    keep(FORMATS / depthfuse.__version__)
    sys.stdout.write(f"kept: {FORMATS / depthfuse.__version__}\n")
