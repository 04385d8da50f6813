"""How much time a run may take, in one word: settings of `PruneConfig` that go together, for `--effort`."""

from __future__ import annotations

from typing import Any

# The integer programme scores the fewest subnets, and the loss tells them apart on few images.
_QUICK_SEARCH = {"strategy": "milp", "metric": "loss"}

# Fitted blocks start near the original ones, so a pretrained net is trained gently, and learns from its original alone:
# from its answers, and from what its blocks give. A learning rate of 1e-3, as for training from scratch, took from it
# all that fitting had kept; labels beside the original's answers lost a point, and a lambda that falls on the way 0.3.
# Some thousands of images make few steps: 32 images a step were better than 64 on two subnets, by cross-entropy on test
# images. All measured in benchmarks/results/studies.md.
_GENTLE = {
    "epochs": 6,
    "batch_size": 32,
    "lr": 2e-4,
    "distill": 1.0,
    "features": 1.0,
    "lambda_schedule": "none",
}

# What training makes of a subnet shows after an epoch, and not before: the search's last round trains its best few.
_FINALISTS = 4

# {effort: entries of `PruneConfig`, as `depthfuse.config.from_dict` takes them}
EFFORTS: dict[str, dict[str, Any]] = {
    "quick": {"start": "fit", "train": False, "search": _QUICK_SEARCH},
    "normal": {"start": "fit", "search": {**_QUICK_SEARCH, "finalists": _FINALISTS}, "finetune": _GENTLE},
    "thorough": {
        "start": "fit",
        "search": {"metric": "loss", "finalists": 2 * _FINALISTS},
        "finetune": {**_GENTLE, "epochs": 30},
    },
}
ABOUT = {
    "quick": "minutes, no training and no labels: merged blocks are fitted",
    "normal": "fitted blocks; the search's best few are trained for an epoch, the best of them then in earnest, taught "
    "by the original net; no labels needed",
    "thorough": "as normal, but the search scores many subnets, twice as many are trained, and the best five times as "
    "long",
}


def overlaid(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested entries: those of `over`, and of `under` where `over` has none."""
    result = dict(under)
    for name, value in over.items():
        below = result.get(name)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[name] = overlaid(below, value) if both else value
    return result
