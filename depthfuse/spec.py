"""`SubnetSpec`: which model, and what becomes of each of its blocks. The one currency between the stages."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from depthfuse.checkpoint import load_json, save_json
from depthfuse.errors import SpecError

KEEP = "keep"
FORMAT = "depthfuse.subnet/1"


@dataclass(frozen=True)
class ModelSource:
    """How to build a timm model: its name and the keyword arguments of `timm.create_model`, as sorted pairs."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def make(cls, name: str, **kwargs: Any) -> ModelSource:
        """`ModelSource.make("resnet18", num_classes=10)`; lists become tuples, as JSON cannot tell them apart."""
        pairs = ((key, tuple(value) if isinstance(value, list) else value) for key, value in kwargs.items())
        return cls(name, tuple(sorted(pairs)))

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.arguments)

    def build(self, pretrained: bool = False) -> nn.Module:
        """Create the model.

        Raises:
            SpecError: a name that timm does not know, arguments that it refuses, or no pretrained weights for them.
            OSError: pretrained weights that cannot be fetched.
        """
        import timm

        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models(), n=5)
            hint = f"; similar names: {', '.join(near)}" if near else ""
            raise SpecError(f"timm has no model {self.name!r}{hint} (timm.list_models() lists all)")
        try:
            model = timm.create_model(self.name, pretrained=pretrained, **self.kwargs)
        except TypeError as error:
            raise SpecError(f"timm refused the arguments {self.kwargs} for {self.name!r}: {error}") from error
        except RuntimeError as error:
            if not pretrained:
                raise
            raise SpecError(
                f"there are no pretrained weights for {self.name!r} with the arguments {self.kwargs}: {error}"
            ) from error
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
        return ModelSource.make(
            name, **({"num_classes": model.num_classes} if hasattr(model, "num_classes") else {})
        )


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
        names = [choice.block for choice in self.choices]
        twice = sorted({name for name in names if names.count(name) > 1})
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
            raise SpecError(f"{where}: expected a document of format {FORMAT!r}, found {found!r}")
        try:
            source = ModelSource.make(document["model"], **document["model_kwargs"])
            choices = tuple(BlockChoice(c["block"], c["candidate"]) for c in document["choices"])
        except (KeyError, TypeError) as error:
            raise SpecError(f"{where}: malformed: {error!r}") from error
        return cls(source, choices)

    @classmethod
    def from_json(cls, text: str) -> SubnetSpec:
        try:
            return cls.from_document(json.loads(text))
        except json.JSONDecodeError as error:
            raise SpecError(f"the spec is no JSON: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON atomically."""
        save_json(path, self._document())

    @classmethod
    def load(cls, path: str | Path) -> SubnetSpec:
        return cls.from_document(load_json(path), where=str(path))
