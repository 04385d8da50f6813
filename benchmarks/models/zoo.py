"""Accelerate and verify many timm models: which run, how much of each is fused, and how far the results are off.

    python -m benchmarks.models.zoo                      # all of MODELS, into benchmarks/results/zoo.md
    python -m benchmarks.models.zoo --models swin_tiny_patch4_window7_224 --out /tmp/zoo.md

Random weights, norms that do something, one image of the model's own size, float32 on the CPU, tune="heuristic" (no
speed is measured here). Exit status 1 where a model fails; its row says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import depthfuse
from depthfuse.benching.bench import machine, randomised
from depthfuse.merging.model_inputs import input_size
from depthfuse.spec import ModelSource

MODELS = (
    *("resnet18", "resnet34", "resnet50", "resnet18d", "resnet26t", "resnext50_32x4d", "seresnet18"),
    *("mobilenetv2_100", "mobilenetv2_140", "mobilenetv3_small_100", "mobilenetv3_large_100", "mnasnet_100"),
    *(
        "efficientnet_b0",
        "efficientnet_lite0",
        "tf_efficientnet_lite0",
        "efficientnet_es",
        "efficientnetv2_rw_t",
    ),
    *("convnext_tiny", "convnext_atto", "convnextv2_atto", "mambaout_femto"),
    *("deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_tiny_patch16_224", "vit_small_patch32_224"),
    *("swin_tiny_patch4_window7_224", "mixer_s32_224", "levit_128s", "mobilevit_xxs", "edgenext_xx_small"),
    *("regnetx_002", "regnety_002", "repvgg_a0", "repvit_m1", "fastvit_t8", "mobileone_s0", "ghostnet_050"),
    *(
        "densenet121",
        "vgg11",
        "vgg11_bn",
        "inception_v3",
        "xception41",
        "dla34",
        "hrnet_w18_small",
        "nf_resnet26",
    ),
    *(
        "test_resnet",
        "test_convnext",
        "test_convnext2",
        "test_efficientnet",
        "test_byobnet",
        "test_vit",
        "test_nfnet",
    ),
)


def row_of(name: str) -> tuple[str, bool]:
    """The model's row of the table, and whether it ran and was verified."""
    try:
        model = randomised(ModelSource.make(name).build())
        x = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        report = depthfuse.accelerate(model, x, tune="heuristic").report()
        seconds = time.perf_counter() - start
    except Exception as problem:  # the table is there to show whatever goes wrong
        reason = (str(problem) or repr(problem)).splitlines()[0].replace("|", "/")
        return f"| {name} | failed: {type(problem).__name__}: {reason} | | | | | |", False
    left = Counter(entry.kind for entry in report.entries if not entry.fused)
    kinds = ", ".join(f"{kind} {count}" for kind, count in left.most_common(6)) + (
        " ..." if len(left) > 6 else ""
    )
    numbers = (report.fused_count, report.absorbed_count, report.unfused_count)
    size = "x".join(map(str, x.shape[1:]))
    cells = (name, size, *numbers, f"{report.max_relative_error:.1e}", f"{seconds:.1f}", kinds or "none")
    return "| " + " | ".join(map(str, cells)) + " |", True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm names")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "zoo.md")
    options = parser.parse_args()
    facts = machine(torch.device("cpu"))
    lines = [
        "# timm models under `depthfuse.accelerate`",
        "",
        f"Written by `python -m benchmarks.models.zoo`: {facts['device']}, {facts['threads']} threads, torch "
        f"{facts['torch']}, timm {facts['timm']}, float32, batch 1, random weights. Fused: operations that stand for a "
        "convolution, linear layer or attention and all that was absorbed into it. Error: the largest difference from "
        "the model's output, over the largest output (more than 1e-4 only where the model itself is as far from its "
        'float64 self). Seconds: of `accelerate(model, x, tune="heuristic")`, its verification included.',
        "",
        "| model | input | fused | absorbed layers | left as they were | error | seconds | what was left |",
        "|---|---|---|---|---|---|---|---|",
    ]
    failed = 0
    for number, name in enumerate(options.models, 1):
        row, ran = row_of(name)
        failed += not ran
        lines.append(row)
        print(f"[{number}/{len(options.models)}] {row}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    print(f"{len(options.models) - failed} of {len(options.models)} verified; written: {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
