"""`depthfuse compare`: pruning methods on one model, under equal conditions, over several seeds and budgets.

Three steps, each restartable. prepare: the latency table, and how many channels to remove for each budget. train: for
each seed a baseline and a supernet, then every method at every budget. measure: latencies of all that came out, and the
tables. The first and the last want a quiet machine; the middle one may be split over processes or machines by seed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthfuse.acceleration import accelerate
from depthfuse.checkpoint import copy_file, load_json, load_tensors, save_json, save_tensors, save_text
from depthfuse.config import DTYPES, CompareConfig, PruneConfig, SearchConfig, to_dict, to_yaml
from depthfuse.costs.latency import conditions_of
from depthfuse.costs.prediction import predict_model_ms
from depthfuse.costs.table import CostTable
from depthfuse.data import has_no_classes
from depthfuse.errors import BudgetError, ConfigError
from depthfuse.measuring.counting import count_macs, count_parameters
from depthfuse.measuring.timing import Timing, time_interleaved
from depthfuse.merging.model_inputs import fixed_image_size
from depthfuse.merging.supernet import Supernet
from depthfuse.rivals import compare_page, compare_report
from depthfuse.rivals.channels import prune_channels, ratio_within
from depthfuse.rivals.images import OnSmaller, size_within
from depthfuse.rivals.methods import METHODS, check_methods
from depthfuse.rivals.trial import Trial
from depthfuse.runs.run import Run
from depthfuse.runs.weights import load, load_strictly
from depthfuse.searching.space import Choices, SearchSpace, check_one_budget
from depthfuse.spec import SubnetSpec
from depthfuse.tasks import CLASSIFICATION
from depthfuse.training.evaluation import evaluate

log = logging.getLogger(__name__)

_SCALES = dict[str, float | None]  # of channels.json and smaller-images.json: what meets each budget
Size = tuple[int, int, int]  # (C, H, W) of images
STEPS = ("prepare", "train", "measure")


def parse_budget(config: SearchConfig, text: str) -> SearchConfig:
    """The search's settings with one budget, written name=value. Raises ConfigError for anything else."""
    name, _, value = text.partition("=")
    names = {"blocks": int, "budget_ms": float, "speedup": float, "macs": float, "parameters": float}
    try:
        budget = {name: names[name](value)}
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"a budget is written name=value with one of {', '.join(names)}; got {text!r}"
        ) from error
    config = dataclasses.replace(config, **{**dict.fromkeys(names), **budget})
    check_one_budget(config)
    return config


class Comparison:
    """One output folder: OUT/latency.json, OUT/seed0/..., OUT/results.csv, OUT/report.md and .html."""

    def __init__(self, config: CompareConfig):
        check_methods(config.methods, config.controls)
        if config.task != CLASSIFICATION.name:
            raise ConfigError(f"methods are compared on {CLASSIFICATION.name} only, not on {config.task}")
        if has_no_classes(config.data):
            raise ConfigError(
                f"methods are compared on images with classes, and those in {config.data.data} have none"
            )
        self.config = config
        self.methods = list(dict.fromkeys([*config.methods, *config.controls]))
        self.searches = {text: parse_budget(config.search, text) for text in config.budgets}
        self.dir = config.out

    def run(self, until: str = "measure") -> None:
        """Do the steps up to `until`; what is done is skipped."""
        steps = STEPS[: STEPS.index(until) + 1]
        self.prepare()
        if "train" in steps:
            for seed in self.config.seeds:
                self.train(seed)
        if "measure" in steps:
            self.measure()

    def _seed_run(self, seed: int) -> Run:
        """The baseline, supernet and data of a seed; the first seed's folder also serves to prepare."""
        latency = self.config.latency
        if (self.dir / "latency.json").exists():
            # made for this comparison, though maybe on more threads than train
            latency = dataclasses.replace(latency, table=self.dir / "latency.json", foreign_table=True)
        return self._run(out=self.dir / f"seed{seed}", seed=seed, latency=latency)

    def _run(self, **changes: Any) -> Run:
        settings = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(PruneConfig)}
        return Run(PruneConfig(**settings | changes), until="search")

    # prepare

    def prepare(self) -> None:
        """Measure what every seed shares."""
        path = self.dir / "latency.json"
        if not path.exists():
            run = self._run(out=self.dir / "prepare")
            run.latency(Supernet(run.build())).save(path)
        for name, find in (("channels", self._channel_ratio), ("smaller-images", self._image_size)):
            path = self.dir / f"{name}.json"
            scales = load_json(path, _SCALES) if path.exists() else {}
            missing = [text for text in self.searches if text not in scales]
            if name not in self.methods or not missing:
                continue
            run = self._seed_run(self.config.seeds[0])
            for text in missing:
                try:
                    scales[text] = find(run, text)
                except BudgetError as error:
                    log.warning("%s: %s", text, error)
                    scales[text] = None
                save_json(path, scales)

    def _channel_ratio(self, run: Run, text: str) -> float:
        model = run.build().to(run.device).eval()
        cost, limit = self._cost(run, text, model)
        return ratio_within(lambda ratio: cost(prune_channels(model, run.size, ratio), run.size), limit)

    def _image_size(self, run: Run, text: str) -> int:
        model = run.build().to(run.device).eval()
        if fixed_image_size(model) is not None:
            raise BudgetError(f"{self.config.model} takes images of one size only")
        cost, limit = self._cost(run, text, model)
        channels, size, _ = run.size
        return size_within(lambda smaller: cost(model, (channels, smaller, smaller)), limit, size)

    def _cost(
        self, run: Run, text: str, model: nn.Module
    ) -> tuple[Callable[[nn.Module, Size], float], float]:
        """What a net costs for images of a size, in the unit of a budget, and how much it may."""
        costs, latency = self._tables(run, text)
        space = SearchSpace(Supernet(model).options(), self.searches[text], costs, latency)
        if (
            space.blocks is not None
        ):  # as fast as the cheapest subnet with so many blocks would be unfair: the mean
            cheapest = sorted(max(s.values()) for p, s in costs.saved.items() if p in space.options)
            limit = costs.whole - statistics.mean(cheapest) * space.blocks
        else:
            assert space.limit is not None
            limit = space.limit
        settings = self.config.latency
        # as whoever uses them would run them: op by op, small images or few channels would gain less than they do
        options: dict[str, Any] = {"backend": settings.backend, "verify": False}
        images = torch.randn(settings.batch_size, *run.size, device=run.device)
        whole = accelerate(model, images, **options)

        def cost(net: nn.Module, size: Size) -> float:
            if costs.unit == "MACs":
                return count_macs(net, size, run.device)
            if costs.unit == "parameters":
                return count_parameters(net)
            if settings.device != "here":
                return predict_model_ms(
                    net, size, settings.device, DTYPES[settings.dtype], settings.batch_size
                )
            x = torch.randn(settings.batch_size, *size, device=run.device)
            fast = accelerate(net.eval(), x, **options)
            times = _time({"whole": (whole, images), "net": (fast, x)}, settings.rounds)
            return costs.whole / times["net"].speedup_over(times["whole"])

        return cost, limit

    def _tables(self, run: Run, text: str) -> tuple[CostTable, CostTable]:
        """(costs in the unit of a budget, latency)."""
        run.config = dataclasses.replace(run.config, search=self.searches[text])
        return run.costs(Supernet(run.build()))

    # train

    def train(self, seed: int) -> None:
        """All methods at all budgets for one seed."""
        run = self._seed_run(seed)
        baseline_top1 = evaluate(run.baseline().to(run.device).eval(), run.data.val_loader()).top1
        for text in self.searches:
            for name in self.methods:
                folder = self._folder(seed, text, name)
                if self._is_done(folder) or self._done_elsewhere(seed, text, name):
                    continue
                costs, latency = self._tables(run, text)  # and sets the run's budget
                ratio, size = self._scale("channels", text), self._scale("smaller-images", text)
                trial = Trial(run, costs, latency, folder, ratio, None if size is None else int(size))
                log.info("seed %d, %s, %s", seed, text, name)
                try:
                    net, choices = METHODS[name].run(trial)
                except BudgetError as error:  # not every method reaches every budget
                    log.warning("%s cannot reach %s: %s", name, text, error)
                    unreachable = {"method": name, "budget": text, "seed": seed, "unreachable": str(error)}
                    save_json(folder / "trial.json", unreachable)
                    continue
                score = evaluate(net, run.data.val_loader())
                if choices:
                    _describe(run, choices, folder)
                save_tensors(_weights(folder, choices), net.state_dict(), {"model": run.source.name})
                document = {
                    "method": name,
                    "budget": text,
                    "seed": seed,
                    "top1": score.top1,
                    "loss": score.loss,
                    "baseline_top1": baseline_top1,
                    "choices": choices,
                    "channel_ratio": trial.channel_ratio if choices is None else None,
                    "image_size": net.size if isinstance(net, OnSmaller) else None,
                    "macs": count_macs(net, run.size, run.device),
                    "parameters": count_parameters(net),
                    "seconds": trial.seconds,
                    **trial.facts,
                }
                save_json(folder / "trial.json", document)
                self._is_done(folder)

    def _is_done(self, folder: Path) -> bool:
        """Whether a trial is. Its training checkpoints are then of no more use: a kill may have come between writing
        its result and deleting them."""
        done = (folder / "trial.json").exists()
        for state in folder.glob("*.state") if done else ():
            state.unlink()
        return done

    def _done_elsewhere(self, seed: int, text: str, name: str) -> bool:
        """Take over what is the same at another budget and done there."""
        if not METHODS[name].budget_free:
            return False
        for other in self.searches:
            done, folder = self._folder(seed, other, name), self._folder(seed, text, name)
            if (done / "trial.json").exists():
                trial = load_json(done / "trial.json", compare_report.TRIAL)
                copy_file(_weights(done, trial["choices"]), _weights(folder, trial["choices"]))
                save_json(folder / "trial.json", {**trial, "budget": text})
                return True
        return False

    def _folder(self, seed: int, text: str, name: str) -> Path:
        return self.dir / f"seed{seed}" / text.replace("=", "-") / name

    def _scale(self, name: str, text: str) -> float | None:
        path = self.dir / f"{name}.json"
        return load_json(path, _SCALES).get(text) if path.exists() else None

    # measure

    def measure(self) -> None:
        """Latency of every net that came out, accelerated, beside the accelerated baseline; then the tables."""
        run = self._seed_run(self.config.seeds[0])
        trials = [
            load_json(self._folder(seed, text, name) / "trial.json", compare_report.TRIAL)
            for text in self.searches
            for name in self.methods
            for seed in self.config.seeds
        ]
        x = torch.randn(self.config.latency.batch_size, *run.size, device=run.device)
        baseline = accelerate(run.baseline().to(run.device).eval(), x, backend=self.config.latency.backend)
        unreachable = [trial for trial in trials if "unreachable" in trial]
        trials = [trial for trial in trials if "unreachable" not in trial]
        known: dict[str, tuple[float, float]] = {}
        whole_ms = []
        for trial in trials:
            # equal architectures run equally fast
            key = f"{trial['choices']} {trial['channel_ratio']} {trial['image_size']}"
            if key not in known:
                net = self._rebuild(run, trial).to(run.device).eval()
                given = x
                if isinstance(net, OnSmaller):  # its user has smaller images, and need not reduce them
                    net, given = net.net, net.reduced(x)
                fast = accelerate(net, given, backend=self.config.latency.backend)
                rounds = max(15, self.config.latency.rounds)
                times = _time({"baseline": (baseline, x), "net": (fast, given)}, rounds)
                known[key] = times["net"].median_ms, times["net"].speedup_over(times["baseline"])
                whole_ms.append(times["baseline"].median_ms)
            trial["latency_ms"], trial["speedup"] = known[key]
        here = dataclasses.replace(self.config.latency, device="here")
        results = {
            "model": run.source.name,
            "model_kwargs": run.source.kwargs,
            "conditions": conditions_of(Supernet(run.build().to(run.device)), run.size, here),
            "chosen_by": CostTable.load(self.dir / "latency.json").conditions,
            "settings": to_dict(self.config),
            "baseline": {**self._baseline_row(run), "latency_ms": statistics.median(whole_ms)},
            "trials": trials,
            "unreachable": unreachable,
        }
        save_json(self.dir / "results.json", results)
        save_text(self.dir / "config.yaml", to_yaml(self.config))
        compare_report.write(self.dir, results)
        save_text(self.dir / compare_page.FILE, compare_page.html(results, self.config))

    def _baseline_row(self, run: Run) -> dict[str, Any]:
        net = run.build()
        seconds = [
            load_json(self.dir / f"seed{seed}" / "seconds_baseline.json", float)
            for seed in self.config.seeds
            if (self.dir / f"seed{seed}" / "seconds_baseline.json").exists()
        ]
        return {
            "macs": count_macs(net.to(run.device), run.size, run.device),
            "parameters": count_parameters(net),
            "seconds": statistics.mean(seconds) if seconds else 0.0,
        }

    def _rebuild(self, run: Run, trial: Mapping[str, Any]) -> nn.Module:
        folder = self._folder(trial["seed"], trial["budget"], trial["method"])
        if trial["choices"]:
            return load(folder)
        if trial["choices"] is None:
            seed_run = self._seed_run(trial["seed"])  # which channels go depends on the baseline's weights
            net = prune_channels(seed_run.baseline(), run.size, trial["channel_ratio"])
        elif trial["image_size"] is not None:
            net = OnSmaller(run.build(), trial["image_size"])
        else:
            net = run.build()
        path = _weights(folder, trial["choices"])
        load_strictly(net, load_tensors(path)[0], path)
        return net


def _describe(run: Run, choices: Choices, folder: Path) -> None:
    """What `load`, `accelerate` and `export` read in the folder of a run, beside the weights."""
    for name in ("config.yaml", "feeding.json", "latency.json"):
        copy_file(run.dir / name, folder / name)
    SubnetSpec.from_mapping(run.source, choices).save(folder / "subnet.json")


def _weights(folder: Path, choices: Choices | None) -> Path:
    """A net whose blocks are pruned has its weights where a run has them."""
    return folder / ("merged.safetensors" if choices else "weights.safetensors")


def _time(calls: Mapping[str, tuple[nn.Module, torch.Tensor]], rounds: int) -> dict[str, Timing]:
    """Of nets on their inputs, in turn."""
    device = next(x.device for _, x in calls.values())
    runs = {name: (lambda net=net, x=x: net(x)) for name, (net, x) in calls.items()}
    return time_interleaved(runs, rounds=rounds, device=device)


def compare(config: CompareConfig, until: str = "measure") -> Path:
    """Run a comparison up to a step; returns its folder. On one process: ConfigError where torchrun started several."""
    if until not in STEPS:
        raise ConfigError(f"unknown step {until!r}; known: {', '.join(STEPS)}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ConfigError(
            f"a comparison runs on one process, and {processes} were started, which would write the same files: give "
            "each process seeds of its own (--seeds 0, --seeds 1) and a folder of its own, without torchrun"
        )
    Comparison(config).run(until)
    return config.out
