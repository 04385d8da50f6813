"""`SubnetSpec`: which model, and what becomes of each of its blocks. The one currency between the stages."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from depthfuse.architecture import allow_keywords, plain_arguments
from depthfuse.checkpoint import plain_json, read_json, save_text
from depthfuse.errors import SpecError
from depthfuse.origins import allow_origin, check_model_name, create, is_own
from depthfuse.shapes import ShapesOnly, bytes_of_model
from depthfuse.untrusted import MALFORMED, conform, parse_json

KEEP = "keep"
FORMAT = "depthfuse.subnet/1"
_SHAPE = {
    "format": str,
    "model": str,
    "model_kwargs": dict[str, Any],
    "choices": [{"block": str, "candidate": str}],
}


@dataclass(frozen=True)
class ModelSource:
    """How to build a model: its name (`depthfuse.origins`: a model of timm's or torchvision's, or a factory) and the
    keyword arguments of what builds it, `timm.create_model` for one, as sorted pairs.

    Wherever it comes from, it holds nothing but plain arguments of `depthfuse.architecture`'s list, or, for a factory,
    plain arguments of any name; raises SpecError for others.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        plain = plain_arguments(dict(self.arguments), is_own(self.name))
        object.__setattr__(self, "arguments", tuple(plain.items()))

    @classmethod
    def make(cls, name: str, /, **kwargs: Any) -> ModelSource:
        """`ModelSource.make("resnet18", num_classes=10)`; lists become tuples, as JSON cannot tell them apart."""
        return cls.of_document(name, kwargs)

    @classmethod
    def of_document(cls, name: Any, arguments: Any) -> ModelSource:
        """From what a file holds: anything. Raises SpecError for what is no name and no plain arguments."""
        name = check_model_name(name)
        return cls(name, tuple(plain_arguments(arguments, is_own(name)).items()))

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.arguments)

    def build(self, pretrained: bool = False, at_most_bytes: int | None = None) -> nn.Module:
        """Create the model.

        Args:
            at_most_bytes: of all its tensors; the machine's memory by default. Weighed before anything is allocated.

        Raises:
            SpecError: a name that is not known or not allowed, arguments that are refused, no pretrained weights for
                them, a factory that fails, or that gives another model when it is called again, or a model that is too
                large. OSError: pretrained weights that cannot be fetched.
        """
        shapes = self.build_shapes()
        size = bytes_of_model(shapes)
        limit = _memory_bytes() if at_most_bytes is None else at_most_bytes
        if size > limit:
            raise SpecError(
                f"{self.name!r} with the arguments {self.kwargs} takes {size / 1e6:,.0f} MB, where "
                f"{limit / 1e6:,.0f} MB are the most"
            )
        model = create(check_model_name(self.name), self.kwargs, pretrained)
        if not pretrained and _shapes(shapes) != _shapes(model):
            raise SpecError(
                f"{self.name!r} gave models of other shapes when it was called twice with the arguments {self.kwargs}: "
                "what is saved could not be loaded again"
            )
        model.depthfuse_source = self
        return model

    def build_shapes(self) -> nn.Module:
        """The model with parameters that have shapes and no memory. Raises SpecError like `build`."""
        with ShapesOnly():
            model = create(check_model_name(self.name), self.kwargs, pretrained=False)
        model.depthfuse_source = self
        return model

    @staticmethod
    def of(model: nn.Module) -> ModelSource:
        """The source of a model: as built by `ModelSource.build`, or else read off timm's `pretrained_cfg`."""
        source = getattr(model, "depthfuse_source", None)
        if source is not None:
            return source
        config = getattr(model, "pretrained_cfg", None) or {}
        name = config.get("architecture") or type(model).__name__
        classes = getattr(model, "num_classes", None)
        return ModelSource(name, (("num_classes", classes),) if isinstance(classes, int) else ())


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class BlockChoice:
    """One block, by its module path in the original model, and the merge candidate chosen for it."""

    block: str
    candidate: str


@dataclass(frozen=True)
class SubnetSpec:
    """A subnet: the model it is cut from and the pruned blocks. Blocks that are not named are kept.

    Frozen and hashable by content; `save` and `load` go through JSON.
    """

    source: ModelSource
    choices: tuple[BlockChoice, ...] = ()

    def __post_init__(self) -> None:
        counts = Counter(choice.block for choice in self.choices)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise SpecError(f"the spec names block(s) {', '.join(twice)} more than once")

    @classmethod
    def from_mapping(cls, source: ModelSource, choices: Mapping[str, str]) -> SubnetSpec:
        """From {block path: candidate}; entries with "keep" are dropped."""
        return cls(source, tuple(BlockChoice(b, c) for b, c in choices.items() if c != KEEP))

    def mapping(self) -> dict[str, str]:
        """{block path: candidate} of the pruned blocks."""
        return {choice.block: choice.candidate for choice in self.choices}

    def to_json(self) -> str:
        return json.dumps(self._document(), indent=2)

    def _document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.source.name,
            "model_kwargs": self.source.kwargs,
            "choices": [asdict(choice) for choice in self.choices],
        }

    @classmethod
    def from_document(cls, document: Any, where: str = "spec") -> SubnetSpec:
        """From parsed JSON. Raises SpecError that names what is missing or wrong."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else type(document).__name__
            raise SpecError(f"{where}: expected a document of format {FORMAT!r}, found {found!r:.60}")
        try:
            conform(document, _SHAPE, "the spec")
        except ValueError as error:
            raise SpecError(f"{where}: malformed: {error}") from error
        try:
            source = ModelSource.of_document(document["model"], document["model_kwargs"])
            return cls(source, tuple(BlockChoice(c["block"], c["candidate"]) for c in document["choices"]))
        except SpecError as error:
            raise SpecError(f"{where}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> SubnetSpec:
        try:
            document = parse_json(text)
        except MALFORMED as error:
            raise SpecError(f"the spec is no JSON: {error}") from error
        return cls.from_document(document)

    def save(self, path: str | Path) -> None:
        """Write JSON atomically: without a checksum, as people edit it; what is read is checked against the model."""
        save_text(path, json.dumps(plain_json(path, self._document()), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SubnetSpec:
        """Raises CheckpointError for a file that is missing or no JSON, SpecError for one that holds no spec."""
        return cls.from_document(read_json(path), where=str(path))


def key_of(choices: Mapping[str, str]) -> str:
    """A text that is equal for equal subnets, {path of a block: candidate}."""
    return ",".join(f"{path}={name}" for path, name in sorted(choices.items()))


__all__ = ["KEEP", "BlockChoice", "ModelSource", "SubnetSpec", "allow_keywords", "allow_origin", "key_of"]
