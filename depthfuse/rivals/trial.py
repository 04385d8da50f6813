"""One method on one model, seed and budget: what all methods share, and what each is charged for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from depthfuse.checkpoint import load_json, load_tensors, save_json, save_tensors
from depthfuse.config import FinetuneConfig, TrainConfig
from depthfuse.costs.latency import subnets_ms
from depthfuse.costs.table import CostTable
from depthfuse.data import DataBundle
from depthfuse.fitting.calibration import Calibration
from depthfuse.fitting.fitted import with_fitted
from depthfuse.merging.supernet import Supernet
from depthfuse.runs import finalists
from depthfuse.runs.run import Run
from depthfuse.runs.weights import load_strictly
from depthfuse.searching.search import search
from depthfuse.searching.space import Choices, SearchSpace
from depthfuse.spec import SubnetSpec
from depthfuse.training.loop import fit
from depthfuse.training.objectives import Objective, TaughtObjective

# the net in its final form, and what is pruned, where that is blocks
Result = tuple[nn.Module, Choices | None]


@dataclass
class Trial:
    """One method on one model, seed and budget.

    run: holds the baseline, the supernet and the data of this seed. channel_ratio, image_size: the share of channels to
    remove, and the size of images, that meet the budget; None where none does.
    seconds: wall time that the method has used beside the baseline's.
    """

    run: Run
    costs: CostTable
    latency: CostTable
    folder: Path
    channel_ratio: float | None = None
    image_size: int | None = None
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> SearchSpace:
        """The subnets within the budget."""
        options = self.baseline_supernet().options()
        return SearchSpace(options, self.run.config.search, self.costs, self.latency)

    def baseline_supernet(self) -> Supernet:
        """A supernet that knows no more than the baseline."""
        return self.run.switched(self.run.baseline())

    def shared_supernet(self) -> Supernet:
        """The trained supernet of this seed, which several methods share; each is charged for its training."""
        net = self.run.supernet()
        self.seconds += self.run.stage_seconds("supernet")
        return net

    def calibration(self) -> Calibration:
        """A supernet whose candidates are fitted, which several methods share; each is charged for it."""
        net = with_fitted(self.baseline_supernet())
        calibration = Calibration(net, self.run.data, self.run.config.search.calibration_images)
        path = self.folder.parent / "fitted.safetensors"
        if not path.exists():
            started = time.monotonic()
            calibration.fit_candidates(self.space.options)
            save_json(path.with_suffix(".json"), time.monotonic() - started)
            save_tensors(path, net.state_dict(), {"model": self.run.source.name})
        load_strictly(net, load_tensors(path)[0], path)
        self.seconds += load_json(path.with_suffix(".json"), float)
        return calibration

    def fit(
        self,
        objective: Objective,
        stage: str,
        settings: TrainConfig,
        data: DataBundle | None = None,
        folder: Path | None = None,
    ) -> float:
        """Train `objective.net` in place; goes on after an interruption, from its state in `folder`, by default the
        trial's. Returns the seconds."""
        config = self.run.config
        result = fit(
            objective,
            data or self.run.data,
            settings,
            self.run.accelerator,
            stage=stage,
            seed=config.seed,
            checkpoint=(folder or self.folder) / f"{stage}.state",
            checkpoint_seconds=config.checkpoint_seconds,
            calibration_images=config.search.calibration_images,
        )
        self.seconds += result.seconds
        return result.seconds

    def search(
        self,
        supernet: Supernet,
        name: str = "all",
        settle: Callable[[], None] | None = None,
        start: Callable[[Choices], Supernet] | None = None,
        trained: bool = True,
        **changes: Any,
    ) -> Choices:
        """The best subnet of the supernet within the budget; searched once, and charged to each that asks.

        name: of the search, where another supernet or `changes` make it another one. settle: see `search`. start: gives
        the supernet whose weights a finalist is trained from; by default the one that is searched. trained: whether the
        finalists, if there are several, are trained to be chosen from, or the best by score is taken.
        """
        shared = self.folder.parent
        found, journal = shared / f"subnet_{name}.json", shared / f"search_{name}.jsonl"
        if not found.exists():
            started = time.monotonic()
            config = self.run.config
            settings = dataclasses.replace(config.search, **changes)
            result = search(
                supernet,
                self.run.data,
                settings,
                self.latency,
                costs=self.costs,
                seed=config.seed,
                journal=journal,
                settle=settle,
                measure_ms=subnets_ms(
                    supernet,
                    self.run.size,
                    config.latency,
                    self.latency,
                    shared / "subnets.json",
                ),
            )
            assert result.spec is not None
            document = {"choices": result.spec.mapping(), "finalists": list(result.finalists)}
            save_json(found, document | {"seconds": time.monotonic() - started, "scored": result.scored})
        answer = load_json(
            found, {"choices": dict[str, str], "finalists?": [dict[str, str]], "seconds": float}
        )
        self.seconds += answer["seconds"]
        candidates = answer.get("finalists", [])
        if not trained or len(candidates) < 2:
            return answer["choices"]
        return self._decide(shared / f"finalists_{name}.json", candidates, start or (lambda _: supernet))

    def _decide(
        self, entered: Path, candidates: Sequence[Choices], start: Callable[[Choices], Supernet]
    ) -> Choices:
        """The best of a search's finalists, as `runs.finalists` has it; their training is charged to each that asks."""
        if not entered.exists():
            finalists.enter(entered, candidates)
        charged = self.seconds

        def train(choices: Choices, stage: str) -> tuple[nn.Module, float]:
            settings = finalists.short(self.run.config.finetune, self.run.config.search)
            subnet = self.subnet(start(choices), choices)
            return subnet, self._train(subnet, stage, settings, entered.parent)

        chosen = finalists.decide(entered, train, self.run.judge(), self.run.accelerator)
        self.seconds = charged + sum(row["seconds"] for row in load_json(entered, finalists.SHAPE))
        return chosen

    def finetune(self, net: Supernet, choices: Choices, **changes: Any) -> Result:
        """Train a subnet as configured (but for `changes`), with the baseline as its teacher, and merge it."""
        subnet = self.subnet(net, choices)
        self._train(subnet, "finetune", dataclasses.replace(self.run.config.finetune, **changes))
        return self.run.merged(subnet), choices

    def subnet(self, net: Supernet, choices: Choices) -> Supernet:
        return net.subnet(SubnetSpec.from_mapping(net.source, choices))

    def _train(
        self, subnet: Supernet, stage: str, settings: FinetuneConfig, folder: Path | None = None
    ) -> float:
        """In place; returns the seconds."""
        seconds = self.fit(self.run.objective(subnet, settings), stage, settings, folder=folder)
        subnet.set_lambda(0.0)
        return seconds

    def train_plain(self, net: nn.Module, epochs: int, **changes: Any) -> nn.Module:
        """Train a net without switches, with the same teacher and settings (but for `changes`) as subnets."""
        settings = dataclasses.replace(self.run.config.finetune, epochs=epochs, **changes)
        net = net.to(self.run.device)
        self.fit(TaughtObjective(net, **self.run.teaching(settings)), "finetune", settings)
        return net.eval()

    def total_epochs(self) -> int:
        """Epochs that every method has beside the baseline's."""
        return self.run.config.supernet.epochs + self.run.config.finetune.epochs
