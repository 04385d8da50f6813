"""What a block is made of, by the paths of its layers: a chain of convolutions with or without a skip, or the parts of
a ConvNeXt block. `reading.py` finds it out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from timm.layers import BatchNormAct2d
from torch import nn

from depthfuse.merging.adapters.base import own_activation
from depthfuse.merging.adapters.chain import Chain, Stage
from depthfuse.merging.adapters.convnext import ConvNeXtParts
from depthfuse.merging.computed_weights import plain_type

T = TypeVar("T")


class Unread(Exception):
    """What stands in the way of reading a module as a block."""


class NoBlock(Unread):
    """A module that is no block at all: it holds several, or none."""


class Readings(Generic[T]):
    """What was read of modules, for as long as these live."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, T | tuple[type[Unread], str]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, block: nn.Module, read: Callable[[], T], anew: bool) -> T:
        """What `read` gives, or gave before unless it shall be read `anew`. Raises the Unread that it raises."""
        known = None if anew else self._known.get(block)
        if known is None:
            try:
                known = read()
            except Unread as problem:
                # not the exception: its frames hold the module, which would then live for ever
                known = type(problem), str(problem)
            self._known[block] = known
        if isinstance(known, tuple):
            kind, reason = known
            raise kind(reason)
        return known


@dataclass(frozen=True)
class Layer:
    """A layer of a block: by its path there, or, where the block calls a function, as a module that does the same."""

    path: str | None
    own: nn.Module | None = None

    def of(self, block: nn.Module) -> nn.Module:
        if self.path is None:
            assert self.own is not None
            return self.own
        return block.get_submodule(self.path)


@dataclass(frozen=True)
class Structure:
    """A `Chain` by the paths of its layers, so that it can be read off any copy of the block."""

    stages: tuple[tuple[Layer, Layer | None, tuple[Layer, ...]], ...]  # convolution, norm, activations
    shortcut: tuple[Layer, ...] | None
    drop_path: Layer | None
    end: tuple[Layer, ...]
    before: tuple[Layer, ...]
    shortcut_after_before: bool

    def chain(self, block: nn.Module) -> Chain:
        """The layers of `block` itself."""
        stages = []
        for conv, norm, acts in self.stages:
            norm_module = None if norm is None else norm.of(block)
            found = [layer.of(block) for layer in acts]
            if isinstance(norm_module, BatchNormAct2d) and not isinstance(norm_module.act, nn.Identity):
                found.insert(0, norm_module.act)
            stages.append(Stage(conv.of(block), norm_module, _in_a_row(found)))
        end = _in_a_row([layer.of(block) for layer in self.end])
        first = next((stage.act for stage in stages if stage.act is not None), None)
        if self.shortcut is None:
            shortcut = None
        else:
            layers = [layer.of(block) for layer in self.shortcut]
            if layers and plain_type(layers[-1]) is nn.Conv2d:
                layers.append(nn.Identity())  # in the place of its norm
            shortcut = layers[0] if len(layers) == 1 else nn.Sequential(*layers) if layers else nn.Identity()
        new = None if end is not None else first or _in_a_row([layer.of(block) for layer in self.before[1:]])
        return Chain(
            tuple(stages),
            shortcut,
            None if self.drop_path is None else self.drop_path.of(block),
            end,
            new,
            _in_a_row([_alone(layer.of(block)) for layer in self.before]),
            self.shortcut_after_before,
        )


def _alone(layer: nn.Module) -> nn.Module:
    """A layer that leaves its input alone: the pruned side reads it, too."""
    return layer if isinstance(layer, nn.BatchNorm2d) else own_activation(layer)


@dataclass(frozen=True)
class ConvNeXtStructure:
    """The parts of a ConvNeXt block by their paths."""

    depthwise: Layer
    norm: Layer
    fc1: Layer
    act: Layer
    drop: Layer | None
    fc2: Layer
    gamma: str | None
    drop_path: Layer | None

    def parts(self, block: nn.Module) -> ConvNeXtParts:
        """The layers of `block` itself."""
        gamma = None
        if self.gamma is not None:
            holder, _, name = self.gamma.rpartition(".")
            gamma = getattr(block.get_submodule(holder), name)
        optional = (None if layer is None else layer.of(block) for layer in (self.drop, self.drop_path))
        drop, drop_path = optional
        depthwise, norm, fc1, act, fc2 = (
            layer.of(block) for layer in (self.depthwise, self.norm, self.fc1, self.act, self.fc2)
        )
        return ConvNeXtParts(depthwise, norm, fc1, act, drop, fc2, True, gamma, drop_path)


def _in_a_row(layers: Sequence[nn.Module]) -> nn.Module | None:
    if not layers:
        return None
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
