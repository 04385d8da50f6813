"""What the ImageNet recipes cost: GPU hours and memory, estimated from first principles, not measured.

python -m benchmarks.recipe_cost      # writes benchmarks/results/recipe_cost.csv and .md

Hours: multiply-accumulates of every pass of every stage over an assumed share of the device's published peak. Memory:
parameters and what training keeps of them, and the activations that autograd saves, counted on one image.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import nn

import depthfuse
from depthfuse.config import PruneConfig, load_yaml
from depthfuse.macs import count_macs, count_parameters
from depthfuse.objectives import ProgressiveObjective, SandwichObjective
from depthfuse.roofline import DEVICES

HERE = Path(__file__).parent
IMAGES = 1_281_167
# Assumed: share of the bf16 peak that training sustains. Depthwise and attention-light nets are bound by memory.
SUSTAINED = {"resnet34": 0.30, "mobilenetv2_140": 0.08, "convnext_tiny": 0.20, "deit_tiny_patch16_224": 0.20}
TARGETS = {"MI100": "gfx908", "MI300X": "gfx942", "A100": "sm_80", "H100": "sm_90"}


def passes(config: PruneConfig, candidates: int) -> float:
    """Forward passes an image of the training set costs in the whole job; a backward pass counts as two."""
    supernet = config.supernet.epochs * 3 * (2 + config.supernet.random_subnets)
    teacher = 1 if config.finetune.distill > 0 else 0
    finetune = config.finetune.epochs * (3 + teacher)
    search = config.search
    scored = 1 + candidates + search.best if search.strategy == "milp" else 1
    holdout = config.data.holdout * IMAGES
    return supernet + finetune + scored * (search.calibration_images + holdout) / IMAGES


def saved_bytes(objective: nn.Module, size: tuple[int, int, int]) -> int:
    """Bytes that autograd keeps for one image in bfloat16, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // (2 if tensor.dtype == torch.float32 else 1)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(torch.randn(2, *size), torch.tensor([0, 1]), 0.1)
        del loss
    return sum(kept.values()) // 2


def main() -> None:
    rows = []
    for path in sorted((HERE / "recipes").glob("*.yaml")):
        config = load_yaml(path)
        model = depthfuse.ModelSource.make(config.model).build().train()
        supernet = depthfuse.Supernet(model)
        size = (3, config.data.img_size, config.data.img_size)
        macs, parameters = count_macs(model, size), count_parameters(supernet)
        options = supernet.options()
        total = passes(config, sum(map(len, options.values()))) * IMAGES * 2 * macs
        sandwich = saved_bytes(SandwichObjective(supernet).train(), size)
        supernet.set_choices({p: names[0] for p, names in options.items()})
        progressive = saved_bytes(ProgressiveObjective(supernet).train(), size)
        states = (
            parameters * 4 * (5 if config.finetune.ema_decay else 4)
        )  # weights, gradients, two moments, average
        memory = max(sandwich, progressive) * config.data.batch_size + states
        row = {
            "recipe": path.stem,
            "forward_gmacs": f"{macs / 1e9:.2f}",
            "passes_an_image": f"{passes(config, sum(map(len, options.values()))):.0f}",
            "sustained_share": SUSTAINED[config.model],
            "memory_gib_per_gpu": f"{memory / 2**30:.1f}",
        }
        for name, arch in TARGETS.items():
            peak = DEVICES[arch].bf16_tflops * 1e12 * SUSTAINED[config.model]
            row[f"{name}_gpu_hours"] = f"{total / peak / 3600:.0f}"
        rows.append(row)
        print(row)
    out = HERE / "results"
    with (out / "recipe_cost.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = ["# What the ImageNet recipes cost: estimated, not measured", ""]
    head = list(rows[0])
    for cells in (head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)):
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "GPU hours: all passes over the training images, at the assumed share of the published bf16 peak. Reading and "
        "augmenting images is left out, and so is whatever a node of several GPUs loses. Memory: activations that "
        "autograd keeps at the recipe's batch size, of the largest stage, and the optimiser state. "
        "A run on 8 GPUs takes an eighth of the hours.",
        "",
    ]
    (out / "recipe_cost.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
