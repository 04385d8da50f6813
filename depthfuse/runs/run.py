"""The whole job as restartable stages: baseline, supernet, search, finetune, merge, compare.

Each stage writes one artefact atomically when it is done, and reads those of the stages before it from the disk. A
run that was stopped anywhere is started again with the same command: finished stages are skipped, a stage under way
goes on from its checkpoint.

Several processes do the stages together. Whether an artefact is there, only the main process looks, and only it writes;
what it finds, or raises, all of them learn (`training.processes`), so that all take the same road.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from depthfuse.checkpoint import load_json, load_tensors, save_json, save_tensors
from depthfuse.config import (
    FinetuneConfig,
    PruneConfig,
    parse_model_kwargs,
)
from depthfuse.costs.counting import count_costs
from depthfuse.costs.latency import subnets_ms
from depthfuse.costs.table import CostTable
from depthfuse.data import DataBundle, has_no_classes, open_data
from depthfuse.data.opening import check_fits
from depthfuse.errors import ConfigError
from depthfuse.fitting.calibration import Calibration
from depthfuse.fitting.fitted import with_fitted
from depthfuse.merging.merge import merge
from depthfuse.merging.model_inputs import fixed_image_size, input_size
from depthfuse.merging.supernet import Supernet
from depthfuse.runs import expectation, finalists, folder, report, telling
from depthfuse.runs.answers import answering_classes, ask, give
from depthfuse.runs.closing import Closing
from depthfuse.runs.latencies import make_table
from depthfuse.runs.weights import load, load_strictly, take_given
from depthfuse.searching.search import search
from depthfuse.searching.space import Choices, SearchSpace, budget_unit, check_one_budget
from depthfuse.searching.strategies import find_strategy
from depthfuse.spec import ModelSource, SubnetSpec
from depthfuse.tasks import AGREEMENT, Task, find_task
from depthfuse.training.evaluation import calibrate, check_task
from depthfuse.training.loop import fit, make_accelerator, seed_iteration
from depthfuse.training.objectives import Objective, ProgressiveObjective, SandwichObjective
from depthfuse.training.processes import on_all, on_one

_LEAST_IMAGES = 2048  # for the statistics of a net that is final; the search takes fewer
STAGES = ("baseline", "supernet", "search", "finetune", "merge", "compare")


class Run:
    """One output folder and its stages. Create it with a config; `run` does all stages up to a given one.

    task, data: in the place of those that `config` names; it then holds the task's name and the data's config.
    """

    def __init__(
        self,
        config: PruneConfig,
        until: str = "compare",
        *,
        task: Task | None = None,
        data: DataBundle | None = None,
    ):
        self.task = find_task(config.task) if task is None else task
        if task is not None:
            config = dataclasses.replace(config, task=task.name)
        if data is not None:
            config = dataclasses.replace(config, data=data.config)
        if (config.data.mixup or config.data.cutmix) and not self.task.mixes:
            raise ConfigError(f"mixup and cutmix mix classes, which {config.task} cannot: leave them out")
        self.config = config
        self.given = tuple(
            name for name, own in (("task", task), ("data", data)) if own is not None
        )  # from Python, which no file holds
        self.dir = config.out
        if STAGES.index(until) > STAGES.index("search"):
            check_one_budget(config.search)
        budget_unit(config.search)  # raises for several
        find_strategy(config.search.strategy)
        self.accelerator = make_accelerator(config.amp, config.cpu)
        self.device = self.accelerator.device
        on_one(self.accelerator, lambda: folder.claim(config))
        # nothing is written before the data and the model are known to be good, but for data that is downloaded
        opening = functools.partial(self._open, data)
        self.data, self.source = on_all(self.accelerator, opening, main_first=config.data.download)
        on_one(self.accelerator, lambda: folder.take(config, self.data))

    def _open(self, data: DataBundle | None) -> tuple[DataBundle, ModelSource]:
        """Open the data, choose the model, and see that they and the task fit each other."""
        kwargs = parse_model_kwargs(self.config.model_kwargs)
        probe = ModelSource.make(self.config.model, **kwargs).build()
        Supernet(probe)  # raises where there is nothing to prune
        channels = input_size(probe)[0]
        fixed = fixed_image_size(probe)
        wanted = self.config.data
        if fixed is not None and wanted.img_size is None:
            wanted = dataclasses.replace(wanted, img_size=fixed[0])
        if fixed is not None and fixed != (wanted.img_size,) * 2:
            raise ConfigError(
                f"{self.config.model} takes images of {fixed[0]}x{fixed[1]} pixels, the data gives {wanted.img_size}: "
                f"set --model-kwargs img_size={wanted.img_size} or --data.img-size {fixed[0]}"
            )
        classes = kwargs.get("num_classes") if self.task.by_class else None
        if has_no_classes(wanted) if data is None else not data.labelled:
            classes, self.task = answering_classes(self.config, self.task, probe), AGREEMENT
        if data is None:
            data = open_data(
                wanted,
                num_classes=classes,
                in_chans=channels,
                model_cfg=getattr(probe, "pretrained_cfg", None),
                targets=self.task.targets,
            )
        else:
            check_fits(data, classes, channels, self.task.targets)
        outputs = data.num_classes if self.task.by_class else kwargs.get("num_classes", 0)
        source = ModelSource.make(self.config.model, **{**kwargs, "num_classes": outputs})
        check_task(self.task, source.build(), data)
        return data, source

    @property
    def size(self) -> tuple[int, int, int]:
        return self.data.in_chans, self.data.img_size, self.data.img_size

    def run(self, until: str = "compare") -> None:
        """Do all stages up to `until`, skipping those that are done."""
        expectation.tell(self.config, self.data, self.source, self.task, self.accelerator, until)
        for stage in STAGES[: STAGES.index(until) + 1]:
            seed_iteration(self.config.seed, STAGES.index(stage))
            getattr(self, stage)()
            self.accelerator.wait_for_everyone()
        on_one(self.accelerator, self._tell_page)

    # Each stage returns what later ones need, and always as it is read from its artefact: what was just trained lies in
    # another memory format, so that the same weights would give other last digits than after a kill.

    def baseline(self) -> nn.Module:
        path = self.dir / "baseline.safetensors"
        config, model = self.config, self.build()
        if self._is_done(path):
            return self._answering(self._load_weights(model, path))
        given = functools.partial(take_given, model, self.source, config.weights, config.pretrained)
        if not on_all(self.accelerator, given):
            settings = config.baseline
            self._fit(Objective(model, settings.label_smoothing, self.task), "baseline", settings)
        self._save_weights(model, path)
        return self.baseline()

    def _answering(self, baseline: nn.Module) -> nn.Module:
        """The same; images without classes now have its answers as their targets, which it gives once for all."""
        if self.data.labelled:
            return baseline
        path = self.dir / "answers.safetensors"
        if not self._is_done(path):
            net = baseline.to(self.device)
            on_one(self.accelerator, lambda: save_tensors(path, ask(net, self.data)))
        answers, _ = on_all(self.accelerator, lambda: load_tensors(path))
        self.data = on_all(self.accelerator, lambda: give(self.data, answers, path))
        return baseline

    def supernet(self) -> Supernet:
        path = self.dir / "supernet.safetensors"
        supernet = self.switched(self.baseline())
        fits = self.config.start == "fit"
        if fits:
            supernet = with_fitted(supernet)
        if self._is_done(path):
            return self._load_weights(supernet, path)
        settings = self.config.supernet
        # the search space is checked before hours of training are spent on a budget that nothing meets
        space = self.space(supernet)
        if fits:
            self.calibration(supernet).fit_candidates(space.options)
        else:
            objective = SandwichObjective(
                supernet, space.options, settings.random_subnets, settings.label_smoothing, self.task
            )
            self._fit(objective, "supernet", settings)
        supernet.set_choices({})
        self._save_weights(supernet, path)
        return self.supernet()

    def latency(self, supernet: Supernet) -> CostTable:
        path, settings = self.dir / "latency.json", self.config.latency
        on_one(
            self.accelerator, lambda: make_table(path, supernet, self.size, settings)
        )  # the others read it
        return on_all(self.accelerator, lambda: CostTable.load(path))

    def costs(self, supernet: Supernet) -> tuple[CostTable, CostTable]:
        """(in the budget's unit, in milliseconds)."""
        latency = self.latency(supernet)
        unit = budget_unit(self.config.search)
        if unit in ("MACs", "parameters"):
            return count_costs(supernet, self.size, unit), latency
        return latency, latency

    def space(self, supernet: Supernet) -> SearchSpace:
        return SearchSpace(supernet.options(), self.config.search, *self.costs(supernet))

    def search(self) -> SubnetSpec | None:
        """None without a budget, which leaves the front to pick from."""
        path, entered = self.dir / "subnet.json", self.dir / finalists.FILE
        if not self._is_done(path):
            if not self._is_done(entered):
                supernet = self.supernet()
                tables = self.costs(supernet)
                on_one(self.accelerator, lambda: self._search(supernet, *tables))  # which the others read
            if self._is_done(entered):
                self._decide(path, entered)
        if not self._is_done(path):
            return None
        return on_all(self.accelerator, lambda: SubnetSpec.load(path))

    def _search(self, supernet: Supernet, costs: CostTable, latency: CostTable) -> None:
        settings, journal = self.config.search, self.dir / "search.jsonl"
        if not self.config.train:
            settings = dataclasses.replace(settings, finalists=1)
        fitted = self.calibration(supernet) if self.config.start == "fit" else None
        result = search(
            supernet,
            self.data,
            settings,
            latency,
            costs=costs,
            seed=self.config.seed,
            journal=journal,
            settle=None if fitted is None else fitted.settle,
            task=self.task,
            measure_ms=subnets_ms(
                supernet, self.size, self.config.latency, latency, self.dir / "subnets.json"
            ),
        )
        telling.tell_front(self.dir, result, latency, self.source.name, self.task)
        if len(result.finalists) > 1:
            finalists.enter(self.dir / finalists.FILE, result.finalists)
        elif result.spec is not None:
            result.spec.save(self.dir / "subnet.json")
        self._tell_page()  # training on may take hours

    def _decide(self, path: Path, entered: Path) -> None:
        """Train the finalists of a search, and save the best."""
        settings = finalists.short(self.config.finetune, self.config.search)

        def train(choices: Choices, stage: str) -> tuple[nn.Module, float]:
            subnet = self._started(SubnetSpec.from_mapping(self.source, choices))
            self._train(subnet, stage, settings)
            return subnet, on_one(self.accelerator, lambda: self.stage_seconds(stage))

        chosen = finalists.decide(entered, train, self.judge(), self.accelerator)
        spec = SubnetSpec.from_mapping(self.source, chosen)
        on_one(self.accelerator, lambda: spec.save(path))

    def judge(self) -> Callable[[nn.Module], float]:
        """What decides among finalists: a net's divergence from the baseline, on images that none has seen so."""
        return functools.partial(
            finalists.divergence,
            self.baseline().to(self.device),
            data=self.data,
            task=self.task,
            seed=self.config.seed,
            epoch=self.config.search.finalist_epochs,
        )

    def finetune(self) -> Supernet:
        path = self.dir / "finetune.safetensors"
        spec, settings = self.search(), self.config.finetune
        if self._is_done(path):
            return self._load_weights(self.supernet().subnet(spec, lam=0.0), path)
        subnet = self._started(spec, self.config.train and settings.lambda_schedule != "none")
        if self.config.train:
            self._train(subnet, "finetune", settings)
        elif self.config.start == "supernet":
            images = self.config.search.calibration_images
            calibrate(subnet, self.data, max(images, _LEAST_IMAGES) if images else 0)
        self._save_weights(subnet, path)
        return self.finetune()

    def _started(self, spec: SubnetSpec, gradual: bool = False) -> Supernet:
        """A subnet that is to be trained: its blocks as the supernet has them, or fitted one after another. gradual:
        from the original net on."""
        supernet = self.supernet()
        if self.config.start == "fit":
            fitted = self.calibration(supernet)
            supernet.set_choices(spec)
            fitted.fit_chosen(kept=not gradual)
            fitted.settle()
        return supernet.subnet(spec, lam=0.0)

    def _train(self, subnet: Supernet, stage: str, settings: FinetuneConfig) -> None:
        """In place. The statistics of its batch norms are right afterwards: see studies.md."""
        self._fit(self.objective(subnet, settings), stage, settings)
        subnet.set_lambda(0.0)

    def objective(self, subnet: Supernet, settings: FinetuneConfig) -> ProgressiveObjective:
        """Of training a subnet, taught by the baseline."""
        subnet.set_mixing(settings.mixing)
        schedule = settings.lambda_schedule, settings.lambda_share
        return ProgressiveObjective(subnet, *schedule, settings.features, **self.teaching(settings))

    def calibration(self, supernet: Supernet) -> Calibration:
        """What the candidates of a supernet, whose start is "fit", are fitted by."""
        return Calibration(supernet, self.data, self.config.search.calibration_images)

    def teaching(self, settings: FinetuneConfig) -> dict[str, Any]:
        """What `TaughtObjective` needs to be taught by this run's baseline."""
        return {
            "teacher": self.baseline().to(self.device) if settings.distill or settings.features else None,
            "distill": settings.distill,
            "temperature": settings.temperature,
            "label_smoothing": settings.label_smoothing,
            "task": self.task,
        }

    def switched(self, model: nn.Module) -> Supernet:
        """A supernet of a model, with this run's ablations."""
        settings = self.config.supernet
        return Supernet(model, settings.separate_norms, settings.border_remedy).to(self.device)

    def merged(self, subnet: Supernet) -> nn.Module:
        """A trained subnet, merged."""
        if self.config.supernet.border_remedy:
            return merge(subnet.eval(), self.size)
        return merge(subnet.eval(), self.size, tolerance=float("inf"))  # wrong at the border, as asked

    def merge(self) -> nn.Module:
        path = self.dir / "merged.safetensors"
        if self._is_done(path):
            return on_all(self.accelerator, lambda: load(self.dir)).to(self.device)
        merged = self.merged(self.finetune())
        document = report.merge_document(merged.merge_report)
        on_one(self.accelerator, lambda: save_json(self.dir / "merge.json", document))
        self._save_weights(merged, path)
        return self.merge()

    def compare(self) -> None:
        """Accuracy and latency of all forms, side by side; then report.md, metrics.csv and the plots."""
        path = self.dir / "results.json"
        if not self._is_done(path):
            nets = self.baseline(), self.finetune(), self.merge()
            spec = self.search()
            assert spec is not None  # there is a budget, or the run would not go on to here
            on_one(self.accelerator, lambda: save_json(path, self._measure(*nets, spec)))
        on_one(self.accelerator, lambda: telling.tell_results(self.dir, self.task))

    def _tell_page(self) -> None:
        telling.tell_page(self.dir, self.config, self.task, self.given)

    def _measure(
        self, baseline: nn.Module, pruned: nn.Module, merged: nn.Module, spec: SubnetSpec
    ) -> dict[str, Any]:
        settings = dataclasses.replace(self.config.latency, device="here")
        nets = Closing(baseline.to(self.device), pruned.to(self.device), merged, self.size, settings)
        table = CostTable.load(self.dir / "latency.json")
        merging = load_json(self.dir / "merge.json", report.MERGE)["summary"]
        document = nets.document(self.source, spec, self.config.search, table, self.data, self.task)
        return document | {"merge": merging}

    def build(self) -> nn.Module:
        """The model before any training."""
        seed_iteration(self.config.seed, 0)
        return self.source.build()

    def _fit(self, objective: Objective, stage: str, settings: Any) -> None:
        checkpoint = self.dir / f"{stage}.state"
        result = fit(
            objective,
            self.data,
            settings,
            self.accelerator,
            stage=stage,
            seed=self.config.seed,
            checkpoint=checkpoint,
            checkpoint_seconds=self.config.checkpoint_seconds,
            calibration_images=self.config.search.calibration_images,
        )

        def save() -> None:
            save_json(self.dir / f"history_{stage}.json", result.history)
            save_json(self.dir / f"seconds_{stage}.json", result.seconds)

        on_one(self.accelerator, save)

    def stage_seconds(self, stage: str) -> float:
        """Wall time of a training stage that is done."""
        return load_json(self.dir / f"seconds_{stage}.json", float)

    def _is_done(self, path: Path) -> bool:
        """Whether an artefact is there, for all processes. Its training checkpoint is then of no more use: a kill may
        have come between writing the one and deleting the other."""

        def look() -> bool:
            done = path.exists()
            if done:
                path.with_suffix(".state").unlink(missing_ok=True)
            return done

        return on_one(self.accelerator, look)

    def _save_weights(self, net: nn.Module, path: Path) -> None:
        """The artefact of a stage, whose training checkpoint goes."""
        on_one(self.accelerator, lambda: save_tensors(path, net.state_dict(), {"model": self.source.name}))
        self._is_done(path)

    def _load_weights(self, net: nn.Module, path: Path) -> Any:
        tensors, _ = on_all(self.accelerator, lambda: load_tensors(path))
        load_strictly(net, tensors, path)
        return net


def prune(
    config: PruneConfig,
    until: str = "compare",
    *,
    task: Task | None = None,
    data: DataBundle | None = None,
) -> Run:
    """Run the whole job, or the stages up to `until`; see `depthfuse.config.PruneConfig`.

    task, data: of your own, in the place of those that the config names (`depthfuse.tasks.Task`,
    `depthfuse.data.bundle_of_tensors`). The same have to be given to go on with a run.
    """
    if until not in STAGES:
        raise ConfigError(f"unknown stage {until!r}; known: {', '.join(STAGES)}")
    run = Run(config, until, task=task, data=data)
    run.run(until)
    return run


__all__ = ["STAGES", "Run", "prune"]
