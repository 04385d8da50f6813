"""What each part of the method is worth: the whole job with one setting changed, against the job as configured.

    python -m benchmarks.pruning.ablations --config benchmarks/pruning/studies/cnn.yaml --seeds 0 1 2

All jobs of a seed share a baseline and a latency table, and have the budget of the comparison named last; supernet,
search, progressive training and merging are done anew. A run that was stopped goes on. Seeds may be split over
processes that share the folder (`--no-table`, then once more for the table).
Writes benchmarks/results/studies/NAME_ablations.csv (every job) and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from depthfuse.benching.bench import write_csv
from depthfuse.checkpoint import load_json, save_json, save_text
from depthfuse.config import CompareConfig, PruneConfig, load_yaml
from depthfuse.rivals.compare import Comparison
from depthfuse.runs.run import Run
from depthfuse.training.evaluation import top1

# What score.json holds.
SCORE = {"ablation": str, "seed": int, "top1": float, "baseline_top1": float, "choices": str}
# name: (what it shows, {"stage.setting": value})
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "as configured": ("", {}),
    "no ramp": ("lambda = 0 throughout: direct removal", {"finetune.lambda_schedule": "none"}),
    "linear ramp": ("the same share of training", {"finetune.lambda_schedule": "linear"}),
    "ramp 0.3": ("30 % of training", {"finetune.lambda_share": 0.3}),
    "ramp 0.5": ("50 % of training", {"finetune.lambda_share": 0.5}),
    "ramp 0.9": ("90 % of training", {"finetune.lambda_share": 0.9}),
    "block mixing": ("lambda mixes outputs of whole blocks", {"finetune.mixing": "block"}),
    "no distillation": ("labels alone", {"finetune.distill": 0.0}),
    "shared norms": ("kept and pruned blocks share weights of norms", {"supernet.separate_norms": False}),
    "no re-calibration": ("norm statistics as trained", {"search.calibration_images": 0}),
    "no border remedy": ("merging changes the border", {"supernet.border_remedy": False}),
}


def changed(config: PruneConfig, changes: dict[str, Any]) -> PruneConfig:
    """A copy with other settings, each named "stage.setting"."""
    for name, value in changes.items():
        stage, setting = name.split(".")
        config = dataclasses.replace(
            config, **{stage: dataclasses.replace(getattr(config, stage), **{setting: value})}
        )
    return config


def run_seed(comparison: Comparison, seed: int, names: list[str], out: Path) -> None:
    """All jobs of one seed; those that are done are skipped."""
    config = comparison.config
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(PruneConfig)}
    fields |= {"seed": seed, "search": list(comparison.searches.values())[-1]}
    shared = Run(PruneConfig(**fields | {"out": out / f"seed{seed}" / "baseline"}), until="baseline")
    before = top1(shared.baseline().to(shared.device), shared.data.val_loader())
    latency = dataclasses.replace(config.latency, table=comparison.dir / "latency.json", foreign_table=True)
    for name in names:
        folder = out / f"seed{seed}" / name.replace(" ", "_")
        if (folder / "score.json").exists():
            continue
        fields |= {"out": folder, "weights": shared.dir / "baseline.safetensors", "latency": latency}
        run = Run(changed(PruneConfig(**fields), ABLATIONS[name][1]), until="merge")
        run.run("merge")
        score = top1(run.merge().to(run.device), run.data.val_loader())
        choices = " ".join(f"{path}={name}" for path, name in run.search().mapping().items())
        row = {"ablation": name, "seed": seed, "top1": score, "baseline_top1": before, "choices": choices}
        save_json(folder / "score.json", row)
        print(row, flush=True)


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):+.2f} ± {deviation:.2f}"


def markdown(config: CompareConfig, rows: list[dict[str, Any]], path: Path) -> str:
    """The table: changes against the baseline and, seed by seed, against the job as configured."""
    reference = {row["seed"]: row["top1"] for row in rows if row["ablation"] == "as configured"}
    lines = [
        f"# {config.model}: one setting changed",
        "",
        f"Budget {config.budgets[-1]}; seeds {', '.join(map(str, sorted(reference)))}; settings otherwise those of "
        f"`{path}`. Mean and deviation over the seeds of the merged net's change in top-1 (points), against the "
        "baseline of the same seed and against the job as configured with the same seed.",
        "",
        "| | over the baseline | over the job as configured | |",
        "| --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["ablation"] for row in rows):
        mine = [row for row in rows if row["ablation"] == name]
        over_baseline = spread([row["top1"] - row["baseline_top1"] for row in mine])
        over_reference = spread([row["top1"] - reference[row["seed"]] for row in mine])
        lines.append(f"| {name} | {over_baseline} | {over_reference} | {ABLATIONS[name][0]} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="of a comparison")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument(
        "--no-table", action="store_true", help="run the jobs, leave the table to another call"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "studies")
    args = parser.parse_args()
    config = load_yaml(args.config, CompareConfig)
    comparison = Comparison(config)
    comparison.prepare()
    jobs = comparison.dir / "ablations"
    for seed in args.seeds:
        run_seed(comparison, seed, args.only, jobs)
    if not args.no_table:
        scores = [load_json(path, SCORE) for path in jobs.glob("seed*/*/score.json")]
        scores.sort(key=lambda row: (list(ABLATIONS).index(row["ablation"]), row["seed"]))
        stem = args.out / f"{args.config.stem}_ablations"
        write_csv(scores, stem.with_suffix(".csv"), {})
        save_text(stem.with_suffix(".md"), markdown(config, scores, args.config))
        print(f"written: {stem.with_suffix('.md')}")


if __name__ == "__main__":
    main()
