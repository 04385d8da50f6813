"""Weights on their way into a model: those of a run, a user's own, and pretrained ones of other classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from depthfuse.checkpoint import load_foreign_tensors, load_tensors
from depthfuse.errors import CheckpointError, SpecError
from depthfuse.merging.merge import check_same_shapes, load_merged
from depthfuse.spec import ModelSource, SubnetSpec

log = logging.getLogger(__name__)

CLASSES = "num_classes"


def load_strictly(net: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load a state dict. Raises CheckpointError that names the file where it is of another model."""
    check_same_shapes(net.state_dict(), tensors, path)
    net.load_state_dict(tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What anybody's safetensors file holds. Raises CheckpointError for any other or damaged file."""
    try:
        return load_foreign_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot read weights from {path} (a safetensors file is expected): {error}"
        ) from error


def read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict from anybody's safetensors file. Raises CheckpointError where it is none of this model."""
    tensors = read_tensors(path)
    check_same_shapes(model.state_dict(), tensors, path)
    return tensors


def take_given(model: nn.Module, source: ModelSource, weights: Path | None, pretrained: bool) -> bool:
    """Load a user's weights, or pretrained ones, into a new model, in place; False where it is still to be trained.

    Where they are of other classes than the model, all but its classifier is taken over, and the log says so.

    Raises:
        CheckpointError: weights that differ in anything else. SpecError, OSError: pretrained ones that are not there.
    """
    if weights is None and not pretrained:
        return False
    where, tensors = _given(source, weights)
    left_out = unfit_classifier(source, tensors, where)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in left_out}
    model.load_state_dict({**tensors, **kept})
    if left_out:
        log.info(
            "%s has other classes (%s): all but this classifier is taken over, which starts fresh, and the baseline is "
            "trained from there with the settings of `baseline`",
            where,
            ", ".join(left_out.values()),
        )
    return not left_out


def unfit_given(source: ModelSource, weights: Path | None, pretrained: bool) -> dict[str, str]:
    """What `unfit_classifier` says of a user's weights, or of pretrained ones, which are not fetched for it."""
    if weights is not None:
        return unfit_classifier(source, read_tensors(weights), weights)
    own = _with_own_classes(source)
    return (
        unfit_classifier(source, own.build_shapes().state_dict(), f"pretrained {own.name}")
        if pretrained
        else {}
    )


def _given(source: ModelSource, weights: Path | None) -> tuple[str, dict[str, Tensor]]:
    """(where they come from, the tensors) of a user's weights, or, without a file, of pretrained ones."""
    if weights is not None:
        return str(weights), read_tensors(weights)
    own = _with_own_classes(source)
    return f"pretrained {own.name}", own.build(pretrained=True).state_dict()


def _with_own_classes(source: ModelSource) -> ModelSource:
    """The same model with as many classes as its pretrained weights have, unless it is one without a classifier."""
    if not source.kwargs.get(CLASSES):
        return source
    return ModelSource.make(source.name, **{n: value for n, value in source.kwargs.items() if n != CLASSES})


def unfit_classifier(source: ModelSource, given: Mapping[str, Tensor], where: str | Path) -> dict[str, str]:
    """What of given weights does not fit a model because they are of other classes: {name: shapes in words}.

    Empty where all fits. What depends on the classes is found by building the model with one class more: the tensors,
    and the dimensions of them, that change. Weights of other classes differ there alone, and in all of these tensors.

    Raises:
        CheckpointError: naming `where`, for weights that differ in anything else.
    """
    wanted = _shapes(source.build_shapes().state_dict())
    there = _shapes(given)
    if wanted == there:
        return {}
    classifier = _classifier(source, wanted)
    others = {name: _without(shape, classifier.get(name, ())) for name, shape in wanted.items()}
    differing = {name for name in wanted if wanted[name] != there.get(name)}
    alike = {name: _without(shape, classifier.get(name, ())) for name, shape in there.items()} == others
    if not classifier or differing != set(classifier) or not alike:
        check_same_shapes(source.build_shapes().state_dict(), given, where)
    return {name: f"{name} {list(there[name])} there, {list(wanted[name])} here" for name in classifier}


def _classifier(source: ModelSource, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{tensor: its dimensions that depend on the number of classes}; empty where the model has none, or will not be
    built with another number."""
    try:
        more = ModelSource.make(source.name, **{**source.kwargs, CLASSES: source.kwargs[CLASSES] + 1})
        shapes = _shapes(more.build_shapes().state_dict())
    except (KeyError, TypeError, SpecError):
        return {}
    found = {}
    for name, shape in wanted.items():
        other = shapes.get(name, ())
        if other != shape and len(other) == len(shape):
            found[name] = tuple(i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b)
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _without(shape: tuple[int, ...], dimensions: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with -1 in the place of some of its dimensions."""
    return tuple(-1 if i in dimensions else size for i, size in enumerate(shape))


def load(directory: str | Path) -> nn.Module:
    """Rebuild the merged model of a finished run, in eval mode on the CPU, from subnet.json and merged.safetensors.

    Raises CheckpointError for files that are missing, damaged or of another model, SpecError for a spec that does not
    fit the model it names.
    """
    directory = Path(directory)
    spec = SubnetSpec.load(directory / "subnet.json")
    tensors, _ = load_tensors(directory / "merged.safetensors")
    return load_merged(spec, tensors, directory / "merged.safetensors")
