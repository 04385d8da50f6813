"""The configuration of a run: one definition for Python, command line and YAML."""

from __future__ import annotations

import ast
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from depthfuse.checkpoint import read_bounded
from depthfuse.data import DataConfig
from depthfuse.devices import OPTIONS
from depthfuse.effort import overlaid
from depthfuse.errors import CheckpointError, ConfigError
from depthfuse.untrusted import MALFORMED, check_plain

Schedule = Literal["linear", "cosine", "none"]
SearchMetric = Literal["top1", "loss", "divergence"]
# "here", or a GPU that latencies can be predicted for
LatencyDevice = Literal[("here", *OPTIONS)]
# Of YAML. PyYAML reads 100 kB a second; our largest config has 3 kB, five levels and no aliases.
_MAX_YAML_BYTES, _MAX_YAML_DEPTH = 2**16, 16
_MAX_ARGUMENT_LENGTH = 2000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """One training stage. The learning rate warms up linearly, may hold, and falls along a cosine, per iteration."""

    epochs: int = 10
    batch_size: int | None = None
    """Images per step and process; default: `data.batch_size`. Few images make few steps of large batches."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-5
    warmup_epochs: float = 1.0
    hold_share: float = 0.0
    """Share of the training that stays at the peak after the warm-up: progressive training learns little once its ramp
    is over if the learning rate is over, too."""
    opt: str = "adamw"
    """Any optimiser name of timm."""
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_grad: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights; 0 keeps none."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {self.batch_size}")
        if not 0.0 <= self.hold_share < 1.0:
            raise ConfigError(f"hold_share is a share of the training, in [0, 1), not {self.hold_share}")


@dataclass(frozen=True)
class SupernetConfig(TrainConfig):
    """Supernet training."""

    random_subnets: int = 1
    """Random subnets a step, beside the full and the fully pruned net."""
    separate_norms: bool = True
    """Give kept and pruned blocks batch norms of their own; without, they share weights and biases."""
    border_remedy: bool = True
    """Train pruned blocks with the borders of the merged ones; without, merging changes them. An ablation."""


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Progressive training of the chosen subnet."""

    hold_share: float = 0.3
    lambda_schedule: Schedule = "cosine"
    lambda_share: float = 0.4
    """Share of the training after which lambda has reached 0. The learning rate should then still be high, see
    `hold_share`; what was measured is in benchmarks/results/studies.md."""
    distill: float = 0.5
    """Weight of the original net's soft labels; 0 trains on labels alone."""
    temperature: float = 2.0
    features: float = 0.0
    """Weight of the distance between what the pruned blocks give and what the original net's give at their place: the
    squared error over the variance."""
    mixing: Literal["op", "block", "norm", "random"] = "op"
    """op: lambda mixes at each activation and norm; block: outputs of whole blocks; norm: norms only, while
    activations go at once (SLAB); random: lambda is each block's chance to be the original in a step (Theseus)."""


@dataclass(frozen=True)
class SearchConfig:
    """Which subnet. One of blocks, budget_ms, speedup, macs, parameters and points sets the budget; `depthfuse search`
    works without one and gives the front."""

    blocks: int | None = None
    """Prune exactly this many blocks."""
    budget_ms: float | None = None
    """Latency of the accelerated subnet, at most."""
    speedup: float | None = None
    """Accelerated baseline latency over accelerated subnet latency, at least."""
    macs: float | None = None
    """Share of the baseline's multiply-accumulates, at most."""
    parameters: float | None = None
    """Share of the baseline's parameters, at most."""
    points: float | None = None
    """Percentage points lost against the unpruned net on the held-out images, before fine-tuning, at most; the fastest
    subnet within it is taken. With strategy pick only: `depthfuse pick`."""
    strategy: str = "evolution"
    """evolution; milp: exact optimum of summed losses of single blocks, the cheapest; greedy; random, uniform:
    controls; pick: the best of an earlier search's subnets, without scoring more."""
    metric: SearchMetric = "top1"
    """What ranks subnets on held-out images: top1, or the metric of another task; the loss, which is finer where those
    are few; or the divergence of the outputs from the unpruned net's (of class probabilities in nats, else as the task
    teaches), which needs no labels."""
    force: tuple[str, ...] = ()
    """Blocks to prune in any case: "layer1.0", or with its candidate "layer1.0=compact"; "layer1.*" for several."""
    exclude: tuple[str, ...] = ()
    """Blocks never to prune, or candidates never to take: "layer1.0=dense", "*=dense" for none of the kind anywhere."""
    population: int = 24
    parents: int = 8
    generations: int = 4
    mutation: float = 0.1
    """Chance that a mutation changes a block."""
    best: int = 8
    """How many of the integer programme's best subnets are scored."""
    front: int = 8
    """Without a budget: how many budgets, evenly spaced, are searched for the front."""
    calibration_images: int = 512
    """Training images for re-estimating batch norm statistics of each candidate subnet; 0 takes them as they are.
    Candidates that are fitted (`start`) are fitted on them."""
    finalists: int = 1
    """Train this many of the best subnets within the budget for `finalist_epochs` each, and take the one whose outputs
    then diverge least from the original net's: scores of untrained subnets tell little of what training makes of them.
    1 takes the best by score, as a run that does not train (`train`) always does."""
    finalist_epochs: int = 1
    """The epochs of each, by the settings of `finetune`, its blocks pruned at once."""
    losing_merges: bool = False
    """Allow merges that are no faster than the block they replace on this device."""

    def __post_init__(self) -> None:
        for name in ("finalists", "finalist_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class LatencyConfig:
    """How latencies are measured, or for which device they are predicted."""

    batch_size: int = 1
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the accelerated model and its input."""
    rounds: int = 15
    """Interleaved rounds; medians are reported."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    device: LatencyDevice = "here"
    """What to prune for; latencies are predicted by a roofline where it is not 'here'."""
    table: Path | None = None
    """A latency table made before (latency.json of another run, or of `depthfuse latency`), in place of measuring."""
    foreign_table: bool = False
    """Take `table` although it was measured on another device, dtype, version or batch size: to prune for that
    machine."""


@dataclass(frozen=True)
class PruneConfig:
    """The whole job: baseline, supernet, search, progressive training, merge, acceleration, comparison."""

    model: str = "resnet34"
    """A model with prunable blocks (see `depthfuse inspect`): a name of timm's, torchvision:NAME, hf:FOLDER, or a
    factory of your own, package.module:factory, which takes num_classes."""
    task: str = "classification"
    """What it is for: classification, segmentation (mean IoU), detection (AP50), embedding (recall@1), or one of your
    own, package.module:NAME, a depthfuse.tasks.Task or a function that gives one."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of what builds it (timm.create_model), as name=value (img_size=32)."""
    out: Path = Path("runs/prune")
    pretrained: bool = False
    """Take timm's pretrained weights as the baseline instead of training one. Where the data has other classes, all but
    their classifier is taken over, and the baseline is trained from there."""
    weights: Path | None = None
    """Baseline weights: a safetensors file of the model's state dict. For other classes, as `pretrained`."""
    start_from: Path | None = None
    """Folder of another run with the same model, data and seed: its baseline, supernet, latency table and scores are
    taken over, for another budget, strategy or fine-tuning."""
    start: Literal["supernet", "fit"] = "supernet"
    """How the pruned blocks get the weights that the search and the training start from. supernet: trained together
    with the original blocks, hours, labels. fit: merged blocks fitted to what the original ones give on
    `search.calibration_images` images, minutes, no labels; then `supernet` has no meaning."""
    train: bool = True
    """Train the chosen subnet (`finetune`). Without, it is merged as the search found it: quick with start=fit, which
    then fits the chosen blocks once more, one after another."""
    data: DataConfig = field(default_factory=DataConfig)
    baseline: TrainConfig = field(default_factory=TrainConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    seed: int = 0
    amp: Literal["no", "bf16", "fp16"] = "no"
    cpu: bool = False
    """Use the CPU even where a GPU is present."""
    checkpoint_seconds: float = 60.0
    """How often a stage under way is saved, beside the end of each epoch."""


@dataclass(frozen=True)
class CompareConfig(PruneConfig):
    """Methods under equal conditions. All settings of `depthfuse prune` hold for every method; its budget and seed are
    replaced by the lists here."""

    out: Path = Path("runs/compare")
    methods: tuple[str, ...] = (
        "updp",
        "direct",
        "depthshrinker",
        "layer-folding",
        "layermerge",
        "drop",
        "channels",
    )
    """Which methods."""
    controls: tuple[str, ...] = ("longer", "scratch")
    """Beside them: longer, the baseline trained on by labels; smaller-images, the baseline on images so small that it
    meets the budget; scratch, the subnet of updp from random weights, for all epochs and the baseline's, and with a
    supernet to find it, which methods that fit their blocks do without."""
    budgets: tuple[str, ...] = ("speedup=1.3", "speedup=1.6")
    """One entry a budget, as name=value with the names of the search's budgets: speedup=1.26, blocks=6, macs=0.7."""
    seeds: tuple[int, ...] = (0, 1, 2)


def parse_model_kwargs(pairs: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """("img_size=32", "channels=(16,32)") -> {"img_size": 32, "channels": (16, 32)}; words stay strings."""
    result: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier() or len(text) > _MAX_ARGUMENT_LENGTH:
            raise ConfigError(f"model arguments are written name=value, got {pair!r:.100}")
        try:
            result[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[name] = text
        except (MemoryError, RecursionError) as error:
            raise ConfigError(f"the model argument {name} is nested too deep: {text!r:.60}") from error
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML types."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


# Entries that came later. A run of before did what their defaults do.
_ADDED = {
    "PruneConfig": ("task", "start", "train"),
    "SearchConfig": ("points", "finalists", "finalist_epochs"),
    "TrainConfig": ("batch_size",),
    "FinetuneConfig": ("features",),
}


def from_dict(cls: type, values: Any, where: str = "config", complete: bool = False) -> Any:
    """Rebuild a config from plain YAML types.

    complete: every entry has to be there, as in what `to_dict` gives, but for those that came later (`_ADDED`); else
    those that are missing keep their defaults.
    Raises ConfigError that names an unknown, wrongly typed or missing entry.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping, got {values!r:.60}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = [f"{name!s:.60}" for name in values if name not in names]
    if unknown:
        raise ConfigError(f"{where}: unknown entries {', '.join(unknown[:5])}; known: {', '.join(names)}")
    added = [name for base in cls.__mro__ for name in _ADDED.get(base.__name__, ())]
    missing = [name for name in names if name not in values and name not in added]
    if complete and missing:
        raise ConfigError(
            f"{where}: lacks {', '.join(missing)}: it was cut short, or is of another version. Choose another "
            "--out, or delete that folder to start over"
        )
    typed = {name: _typed(hints[name], v, f"{where}.{name}", complete) for name, v in values.items()}
    try:
        return cls(**typed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _typed(hint: Any, value: Any, where: str, complete: bool = False) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where, complete)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(args[0], v, where) for v in value)
    if origin is typing.Literal and value in args:
        return value
    if args and origin not in (tuple, typing.Literal):  # a union such as int | None
        if value is None and type(None) in args:
            return None
        hint = next(a for a in args if a is not type(None))
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where}: a NUL character in {value!r:.60}")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = " or ".join(map(repr, args)) if origin is typing.Literal else getattr(hint, "__name__", hint)
    raise ConfigError(f"{where}: expected {expected}, got {value!r:.60}")


def load_yaml(
    path: str | Path, cls: type = PruneConfig, complete: bool = False, under: dict[str, Any] | None = None
) -> Any:
    """Read a config file, in UTF-8. Entries that it does not name keep their defaults, unless it has to be `complete`.

    under: entries in the place of the defaults.

    Raises ConfigError for a file that is missing, no YAML, larger than any config, or of unknown or wrong entries.
    """
    import yaml

    try:
        values = _plain_loader()(read_bounded(path, _MAX_YAML_BYTES).decode("utf-8-sig")).get_single_data()
        check_plain(values)
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read config {path}: save it as UTF-8 ({error})") from error
    except (CheckpointError, yaml.YAMLError, *MALFORMED) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from error
    values = {} if values is None else values
    if under and isinstance(values, dict):
        values = overlaid(under, values)
    return from_dict(cls, values, where=str(path), complete=complete)


def _plain_loader() -> type:
    """PyYAML's safe loader without aliases, which make a file of a few lines unfold to billions of entries."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.get_event()
                raise yaml.YAMLError(f"the alias *{event.anchor}: write its value out{event.start_mark}")
            if self.depth == _MAX_YAML_DEPTH:
                raise yaml.YAMLError(f"nested deeper than {_MAX_YAML_DEPTH} levels")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep)
            if len(mapping) != len(node.value):
                raise yaml.YAMLError(f"an entry twice in one mapping{node.start_mark}")
            return mapping

    return PlainLoader


def to_yaml(config: Any) -> str:
    """The resolved config, as it is saved beside the results."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)
