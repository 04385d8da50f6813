"""Pruning methods under equal conditions: ours, rivals after their papers, and controls.

A method is a function of a `Trial` (one model, seed and budget) and returns a trained net in its final, merged form.
All start from the same baseline and have the same data, teacher and epochs: those of the supernet stage for choosing,
those of the fine-tuning stage for training. A new method is one function with the decorator.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from depthfuse.data import DataBundle
from depthfuse.data.bundle import Batches
from depthfuse.errors import BudgetError, MethodError
from depthfuse.merging.supernet import Supernet
from depthfuse.rivals.channels import prune_channels
from depthfuse.rivals.gates import FoldingObjective, GatedNet, TopGatesObjective
from depthfuse.rivals.images import OnSmaller
from depthfuse.rivals.trial import Result, Trial
from depthfuse.searching.space import Choices
from depthfuse.searching.strategies import best_additive
from depthfuse.spec import SubnetSpec
from depthfuse.training.evaluation import calibrate, top1
from depthfuse.training.objectives import Objective


@dataclass(frozen=True)
class Method:
    """A registered method. control: no rival but a yardstick. budget_free: the same at any budget."""

    name: str
    text: str
    run: Callable[[Trial], Result]
    control: bool
    budget_free: bool


METHODS: dict[str, Method] = {}


def method(
    name: str, control: bool = False, budget_free: bool = False
) -> Callable[[Callable[[Trial], Result]], Callable[[Trial], Result]]:
    """Function decorator: register a method; its docstring's first line is what tables say of it."""

    def add(run: Callable[[Trial], Result]) -> Callable[[Trial], Result]:
        METHODS[name] = Method(name, (run.__doc__ or "").strip().split("\n")[0], run, control, budget_free)
        return run

    return add


def check_methods(names: tuple[str, ...], controls: tuple[str, ...]) -> None:
    """Raise MethodError for an unknown name, or for a control that is none; the message lists the known."""
    known_controls = [name for name, method in METHODS.items() if method.control]
    for kind, given, known in (("method", names, list(METHODS)), ("control", controls, known_controls)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise MethodError(f"unknown {kind} {unknown[0]!r}; known: {', '.join(known)}")


@method("updp")
def updp(trial: Trial) -> Result:
    """Supernet, search, progressive training (lambda as configured): ours, after UPDP (AAAI 2024)."""
    supernet = trial.shared_supernet()
    return trial.finetune(supernet, trial.search(supernet))


@method("updp-baseline-start")
def updp_baseline_start(trial: Trial) -> Result:
    """As updp, but progressive training starts from the baseline's weights, and not from the supernet's."""
    choices = trial.search(trial.shared_supernet())
    return trial.finetune(trial.baseline_supernet(), choices)


@method("direct")
def direct(trial: Trial) -> Result:
    """The subnet of updp, its blocks pruned at once (lambda = 0 throughout)."""
    supernet = trial.shared_supernet()
    return trial.finetune(supernet, trial.search(supernet), lambda_schedule="none")


def _fitted(trial: Trial, trained: bool = True, gradual: bool = False) -> tuple[Supernet, Choices]:
    """The best subnet of fitted blocks, these fitted once more, one after another.

    trained: see `Trial.search`. gradual: it is to be pruned progressively, from the original net on.
    """
    calibration = trial.calibration()
    net = calibration.supernet
    alone = copy.deepcopy(net.state_dict())

    def start(choices: Choices, gradual: bool = False) -> Supernet:
        net.load_state_dict(alone)
        net.set_choices(choices)
        calibration.fit_chosen(kept=not gradual)
        calibration.settle()
        return net

    choices = trial.search(net, "fitted", calibration.settle, start, trained)
    return start(choices, gradual), choices


@method("fit")
def fit_only(trial: Trial) -> Result:
    """Blocks fitted on a few hundred images, chosen by the same search: no training at all."""
    net, choices = _fitted(trial, trained=False)
    return trial.run.merged(trial.subnet(net, choices)), choices


@method("fit-direct")
def fit_direct(trial: Trial) -> Result:
    """As fit, then all epochs for training, its blocks pruned at once."""
    net, choices = _fitted(trial)
    return trial.finetune(net, choices, lambda_schedule="none", epochs=trial.total_epochs())


@method("fit-progressive")
def fit_progressive(trial: Trial) -> Result:
    """As fit, then all epochs for progressive training."""
    net, choices = _fitted(trial, gradual=True)
    return trial.finetune(net, choices, epochs=trial.total_epochs())


@method("fit-replacing")
def fit_replacing(trial: Trial) -> Result:
    """As fit-progressive, but lambda is a block's chance to be the original in a step."""
    net, choices = _fitted(trial, gradual=True)
    return trial.finetune(net, choices, mixing="random", epochs=trial.total_epochs())


@method("replacing")
def replacing(trial: Trial) -> Result:
    """As updp, but lambda is a block's chance to be the original in a step (BERT-of-Theseus, EMNLP 2020)."""
    supernet = trial.shared_supernet()
    return trial.finetune(supernet, trial.search(supernet), mixing="random")


@method("slab")
def slab(trial: Trial) -> Result:
    """The subnet of updp; only LayerNorm -> BatchNorm is progressive, linearly (SLAB, ICML 2024)."""
    supernet = trial.shared_supernet()
    return trial.finetune(supernet, trial.search(supernet), lambda_schedule="linear", mixing="norm")


@method("drop")
def drop(trial: Trial) -> Result:
    """Whole blocks dropped, chosen by the same search, trained directly."""
    supernet = trial.shared_supernet()
    others = [f"{p}={n}" for p, names in supernet.options().items() for n in names if n != "drop"]
    excluded = (*trial.run.config.search.exclude, *others)
    return trial.finetune(supernet, trial.search(supernet, "drop", exclude=excluded), lambda_schedule="none")


def _default_candidates(trial: Trial) -> Choices:
    """The family's own merge of each block: what the gates lead to."""
    options = trial.baseline_supernet().options()
    space = trial.space
    return {path: next(n for n in options[path] if n in names) for path, names in space.options.items()}


@method("depthshrinker")
def depthshrinker(trial: Trial) -> Result:
    """Learned 0/1 gates of blocks, the top ones kept, straight-through; then direct training (ICML 2022)."""
    net = GatedNet(trial.baseline_supernet(), _default_candidates(trial)).to(trial.run.device)
    settings = trial.run.config.supernet
    trial.fit(TopGatesObjective(net, trial.space, settings.label_smoothing), "gates", settings)
    return trial.finetune(net.supernet, net.pruned(trial.space), lambda_schedule="none")


@method("layer-folding")
def layer_folding(trial: Trial) -> Result:
    """Learned alpha of activations with the penalty |1 - alpha^2|; then direct training (2021)."""
    net = GatedNet(trial.baseline_supernet(), _default_candidates(trial)).to(trial.run.device)
    settings = trial.run.config.supernet
    trial.fit(FoldingObjective(net, label_smoothing=settings.label_smoothing), "gates", settings)
    return trial.finetune(net.supernet, net.pruned(trial.space), lambda_schedule="none")


@method("layermerge")
def layermerge(trial: Trial) -> Result:
    """Importance of each merge measured by a short training of its own, exact optimum of the sum; direct (ICML 2024).

    The paper solves the sum by dynamic programming over discretised latencies; the integer programme has the same
    optimum without rounding them. The epochs of the other methods' supernet are shared out among the merges.
    """
    space, supernet = trial.space, trial.baseline_supernet()
    merges = [(path, name) for path, names in space.options.items() for name in names]
    settings = trial.run.config.supernet
    short = dataclasses.replace(trial.run.config.finetune, epochs=1, warmup_epochs=0.0)
    data = trial.run.data.batched(short.batch_size)
    iterations = settings.epochs * data.train_batches() // len(merges)
    whole = top1(supernet, trial.run.data.holdout_loader())
    lost: dict[str, dict[str, float]] = {}
    for path, name in merges:
        subnet = supernet.subnet(SubnetSpec.from_mapping(supernet.source, {path: name}))
        if iterations:
            objective = Objective(subnet, short.label_smoothing)
            trial.fit(objective, f"importance_{path}_{name}", short, _FirstBatches(data, iterations))
        calibrate(subnet, trial.run.data, trial.run.config.search.calibration_images)
        lost.setdefault(path, {})[name] = whole - top1(subnet, trial.run.data.holdout_loader())
    trial.facts["importance"] = lost
    (level,) = space.levels(1)
    (choices,) = best_additive(space, lost, level)
    return trial.finetune(supernet, choices, lambda_schedule="none")


class _FirstBatches(DataBundle):
    """The same data, with epochs of `batches` batches."""

    def __init__(self, data: DataBundle, batches: int):
        self._data, self._batches = data, min(batches, data.train_batches())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def batched(self, batch_size: int | None) -> DataBundle:
        return _FirstBatches(self._data.batched(batch_size), self._batches)

    def train_batches(self, world_size: int = 1) -> int:
        return self._batches

    def train_loader(self, **arguments: Any) -> Batches:
        loader = self._data.train_loader(**arguments)
        left = self._batches - arguments.get("start_batch", 0)
        return Batches(lambda: itertools.islice(iter(loader), left), left)

    def val_loader(self) -> Batches:
        return self._data.val_loader()

    def holdout_loader(self) -> Batches:
        return self._data.holdout_loader()

    def calibration_loader(self, num_images: int) -> Batches:
        return self._data.calibration_loader(num_images)

    def mixup(self, label_smoothing: float = 0.0) -> Any:
        return self._data.mixup(label_smoothing)


@method("channels")
def channels(trial: Trial) -> Result:
    """Channel pruning by magnitude with the library torch-pruning, to the same budget; all epochs for training."""
    if trial.channel_ratio is None:
        raise BudgetError("channel pruning does not reach this budget")
    net = prune_channels(trial.run.baseline(), trial.run.size, trial.channel_ratio)
    return trial.train_plain(net, trial.total_epochs()), None


@method("longer", control=True, budget_free=True)
def longer(trial: Trial) -> Result:
    """Control: the baseline, nothing pruned, trained on for the same epochs, by labels: it is its own teacher."""
    return trial.train_plain(trial.run.baseline(), trial.total_epochs(), distill=0.0), {}


@method("smaller-images", control=True)
def smaller_images(trial: Trial) -> Result:
    """Control: the baseline, nothing pruned, on images so small that it meets the budget; all epochs for training."""
    if trial.image_size is None:
        raise BudgetError("no smaller images meet this budget, or the model takes one size only")
    net = OnSmaller(trial.run.baseline(), trial.image_size)
    return trial.train_plain(net, trial.total_epochs()), {}


@method("scratch", control=True)
def scratch(trial: Trial) -> Result:
    """Control: the subnet of updp from random weights, for all epochs, the baseline's included."""
    choices = trial.search(trial.shared_supernet())
    trial.seconds = 0.0  # it is given its architecture
    fresh = trial.run.switched(trial.run.build())
    config = trial.run.config
    settings = {"epochs": trial.total_epochs() + config.baseline.epochs, "lr": config.baseline.lr}
    return trial.finetune(fresh, choices, lambda_schedule="none", **settings)
