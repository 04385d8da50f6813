"""What the ImageNet recipes cost: GPU hours and memory, estimated from first principles, not measured.

python -m benchmarks.pruning.recipe_cost   # benchmarks/results/recipe_cost.csv and .md, and the recipes' comments

Hours: multiply-accumulates of every pass of every stage over an assumed share of the device's published peak. Memory:
parameters and what training keeps of them, and the activations that autograd saves, counted on two images.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import torch
from torch import nn

import depthfuse
from depthfuse.config import PruneConfig, SearchConfig, load_yaml
from depthfuse.devices import OPTIONS
from depthfuse.measuring.counting import count_macs, count_parameters
from depthfuse.merging.supernet import Supernet
from depthfuse.searching.space import SearchSpace
from depthfuse.searching.strategies import find_strategy
from depthfuse.training.objectives import ProgressiveObjective, SandwichObjective

HERE = Path(__file__).parent
IMAGES, VALIDATION_IMAGES = 1_281_167, 50_000
# Assumed: share of the bf16 peak that training sustains. Depthwise and attention-light nets are bound by memory.
SUSTAINED = {"resnet34": 0.30, "mobilenetv2_140": 0.08, "convnext_tiny": 0.20, "deit_tiny_patch16_224": 0.20}
CARDS = {option.upper(): OPTIONS[option] for option in ("mi100", "mi300x", "a100", "h100")}
NOTE = (
    "Estimated, not measured. GPU hours: all passes of all stages (a backward pass counts as two) at `sustained_share` "
    "of the published bf16 peak, which is an assumption, the same for every device: at half the share it takes twice "
    "the hours, and faster cards sustain less of their peak. Reading and augmenting images is left out: "
    "`A100_images_s` is what the workers of each GPU must deliver for the A100's hours to hold, and where they "
    "cannot, they set the pace. What a node of several GPUs loses is left out too; the search runs on one of them. "
    "Memory: of the largest stage, weights, gradients, two moments, moving average, teacher, bfloat16 copies of the "
    "weights, and the activations that autograd keeps at the recipe's batch size (the most of 8 drawn steps of the "
    "supernet), taken as bfloat16 throughout. LayerNorm and softmax keep float32 under autocast, and libraries need "
    "room of their own: leave some."
)


def scored_subnets(options: dict[str, list[str]], search: SearchConfig) -> int:
    """How many subnets the search scores at most: all merges are taken to pay, which needs no latencies."""
    anything = dataclasses.replace(search, speedup=None, blocks=max(1, len(search.force)))
    return find_strategy(search.strategy).count(SearchSpace(options, anything), search)


def forward_passes(config: PruneConfig, scored: int) -> float:
    """Images that go forward through the net in the whole job; a backward pass counts as two."""
    supernet, finetune, calibration = config.supernet, config.finetune, config.search.calibration_images
    held_out = config.data.holdout * IMAGES
    trained = IMAGES - held_out
    teacher = 1 if finetune.distill > 0 else 0
    total = supernet.epochs * (3 * (2 + supernet.random_subnets) * trained + 2 * (calibration + held_out))
    total += scored * (calibration + held_out)
    total += finetune.epochs * ((3 + teacher) * trained + held_out) + calibration
    return total + 5 * VALIDATION_IMAGES  # the forms that the last stage compares


def saved_bytes(objective: nn.Module, size: tuple[int, int, int], draws: int = 1) -> int:
    """Bytes that autograd keeps for one image in bfloat16, parameters left out; the most of several drawn subnets."""
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // (2 if tensor.dtype == torch.float32 else 1)
        return tensor.detach()  # the tensor itself would hold its own graph: nothing would ever be freed

    most = 0
    for seed in range(draws):
        kept.clear()
        torch.manual_seed(seed)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(torch.randn(2, *size), torch.tensor([0, 1]), 0.1)
            del loss
        most = max(most, sum(kept.values()) // 2)
    return most


def memory_bytes(config: PruneConfig, model: nn.Module, supernet: Supernet) -> int:
    """Of the stage that needs most, on each GPU."""
    size = (3, config.data.img_size, config.data.img_size)
    parameters = count_parameters(supernet)

    def states(average: float) -> int:  # weights, gradients, two moments and the average; bfloat16 copies
        return parameters * (4 * (5 if average else 4) + 2)

    batch = config.data.batch_size
    objective = SandwichObjective(supernet, random_subnets=config.supernet.random_subnets)
    sandwich = saved_bytes(objective.train(), size, draws=8) * batch + states(config.supernet.ema_decay)
    forced = dict(entry.split("=") for entry in config.search.force)
    # where the search chooses, no subnet keeps more than one in which every block is mixed
    supernet.set_choices(forced or {path: names[0] for path, names in supernet.options().items()})
    progressive = saved_bytes(ProgressiveObjective(supernet).train(), size) * batch
    progressive += states(config.finetune.ema_decay)
    progressive += 6 * count_parameters(model) if config.finetune.distill > 0 else 0
    return max(sandwich, progressive)


def estimate(path: Path) -> dict[str, str]:
    """One row of the table."""
    config = load_yaml(path)
    model = depthfuse.ModelSource.make(config.model).build().train()
    supernet = Supernet(model)
    macs = count_macs(model, (3, config.data.img_size, config.data.img_size))
    scored = scored_subnets(supernet.options(), config.search)
    passes = forward_passes(config, scored)
    share = SUSTAINED[config.model.partition(".")[0]]
    hours = {
        name: passes * 2 * macs / (card.bf16_tflops * 1e12 * share) / 3600 for name, card in CARDS.items()
    }
    read = (config.supernet.epochs + config.finetune.epochs) * IMAGES
    return {
        "recipe": path.stem,
        "forward_gmacs": f"{macs / 1e9:.2f}",
        "scored_subnets": str(scored),
        "passes_an_image": f"{passes / IMAGES:.0f}",
        "sustained_share": str(share),
        "memory_gib_per_gpu": f"{memory_bytes(config, model, supernet) / 2**30:.1f}",
        **{f"{name}_gpu_hours": f"{value:.0f}" for name, value in hours.items()},
        "A100_images_s": f"{read / hours['A100'] / 3600:.0f}",
    }


def comment(row: dict[str, str]) -> str:
    """What a recipe says of its cost."""
    hours = ", ".join(f"{row[f'{name}_gpu_hours']} {name}" for name in CARDS)
    return (
        f"# Cost (estimated by benchmarks/recipe_cost.py, not measured): GPU hours {hours},\n"
        f"# at {float(row['sustained_share']):.0%} of the bf16 peak and no wait for images; "
        f"{row['memory_gib_per_gpu']} GiB on each GPU at this batch size\n"
    )


def main() -> None:
    rows = []
    for path in sorted((HERE / "recipes").glob("*.yaml")):
        rows.append(row := estimate(path))
        print(row, flush=True)
        text = path.read_text()
        path.write_text(
            re.sub(r"^# Cost .*?(?=^model:)", lambda _, row=row: comment(row), text, flags=re.M | re.S)
        )
    out = HERE.parent / "results"
    with (out / "recipe_cost.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = ["# What the ImageNet recipes cost: estimated, not measured", ""]
    head = list(rows[0])
    for cells in (head, ["---"] * len(head), *([row[key] for key in head] for row in rows)):
        lines.append("| " + " | ".join(cells) + " |")
    (out / "recipe_cost.md").write_text("\n".join([*lines, "", NOTE, ""]))


if __name__ == "__main__":
    main()
