"""Calls and outputs as flat lists of tensors, and what they were made of as a value.

PyTorch's own pytrees know only classes that somebody registered; models return dataclasses, named tuples and
dictionaries of their own. A shape of containers that is not known here is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthfuse.errors import AccelerationError

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)


@dataclass(frozen=True)
class Leaf:
    """The place of a tensor: its number in the flat list."""

    index: int


@dataclass(frozen=True)
class Constant:
    """A value that is no tensor. Equal only to the same value of the same type; NaN equals NaN."""

    value: Any

    def _key(self) -> tuple:
        value = self.value
        is_nan = isinstance(value, float) and math.isnan(value)
        return (type(value), "nan" if is_nan else value, math.copysign(1, value) if value == 0.0 else None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True)
class Container:
    """A list, tuple, dictionary, named tuple, slice or dataclass.

    cls: its class. keys: of a dictionary, or the names of a dataclass's fields that were set; () for the others.
    """

    cls: type
    keys: tuple
    children: tuple[Tree, ...]


Tree = Leaf | Constant | Container


def is_leaf(value: object) -> bool:
    """Whether it is a tensor, or a number that depends on one's size while a model is traced."""
    return isinstance(value, (Tensor, *_SYMBOLIC))


def flatten(value: Any, once: bool = False) -> tuple[list[Any], Tree]:
    """The tensors in `value`, in order, and what holds them.

    Args:
        once: a tensor that appears twice has one place, as outputs need it, where it is the same object again.

    Raises:
        AccelerationError: it holds an object of a class that is not known here; the message names it.
    """
    leaves: list[Any] = []
    numbers: dict[int, int] = {}
    return leaves, _flatten(value, leaves, numbers if once else None, "")


def _flatten(value: Any, leaves: list[Any], numbers: dict[int, int] | None, where: str) -> Tree:
    if is_leaf(value):
        if numbers is not None and id(value) in numbers:
            return Leaf(numbers[id(value)])
        leaves.append(value)
        if numbers is not None:
            numbers[id(value)] = len(leaves) - 1
        return Leaf(len(leaves) - 1)
    if value is None or isinstance(value, _CONSTANTS):
        return Constant(value)
    cls = type(value)

    def all_of(items: Sequence[Any], names: Sequence[Any]) -> tuple[Tree, ...]:
        return tuple(
            _flatten(item, leaves, numbers, f"{where}[{name!r}]")
            for item, name in zip(items, names, strict=True)
        )

    if isinstance(value, dict):
        return Container(cls, tuple(value), all_of(list(value.values()), list(value)))
    if cls in (list, tuple, torch.Size) or _is_named_tuple(cls):
        return Container(cls, (), all_of(value, range(len(value))))
    if isinstance(value, slice):
        return Container(cls, (), all_of((value.start, value.stop, value.step), ("start", "stop", "step")))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(f.name for f in dataclasses.fields(value) if f.init and hasattr(value, f.name))
        return Container(cls, names, all_of([getattr(value, name) for name in names], names))
    raise AccelerationError(
        f"a {cls.__module__}.{cls.__qualname__}{f' at {where}' if where else ''} is passed or returned: expected "
        "tensors, numbers, strings, None, and lists, tuples, dictionaries or dataclasses of them"
    )


def _is_named_tuple(cls: type) -> bool:
    """Those of `collections`, and those of PyTorch's functions."""
    return issubclass(cls, tuple) and (hasattr(cls, "_fields") or cls.__module__ == "torch.return_types")


def unflatten(leaves: Sequence[Any], tree: Tree) -> Any:
    """The value that `flatten` took apart, with other tensors in it."""
    if isinstance(tree, Leaf):
        return leaves[tree.index]
    if isinstance(tree, Constant):
        return tree.value
    children = [unflatten(leaves, child) for child in tree.children]
    if issubclass(tree.cls, dict):
        return _dictionary(tree.cls, dict(zip(tree.keys, children, strict=True)))
    if tree.cls is slice:
        return slice(*children)
    if tree.keys or dataclasses.is_dataclass(tree.cls):
        return tree.cls(**dict(zip(tree.keys, children, strict=True)))
    if hasattr(tree.cls, "_make"):
        return tree.cls._make(children)
    return tree.cls(children)


def _dictionary(cls: type, items: dict) -> Any:
    if cls in (dict, OrderedDict):
        return cls(items)
    if dataclasses.is_dataclass(cls):  # as Hugging Face's outputs, which are both
        names = {f.name for f in dataclasses.fields(cls)}
        if set(items) <= names:
            return cls(**items)
    made = cls.__new__(cls)
    cls.__init__(made)
    made.update(items)
    return made


def map_leaves(tree: Tree, change: Callable[[Leaf], Tree]) -> Tree:
    """The tree with other leaves."""
    if isinstance(tree, Leaf):
        return change(tree)
    if isinstance(tree, Container):
        return Container(tree.cls, tree.keys, tuple(map_leaves(child, change) for child in tree.children))
    return tree


def pairs_of_leaves(tree: Tree, other: Tree) -> list[tuple[int, int]]:
    """The numbers of the leaves that are in the same place in both."""
    if isinstance(tree, Leaf) and isinstance(other, Leaf):
        return [(tree.index, other.index)]
    if isinstance(tree, Container) and isinstance(other, Container):
        children = zip(tree.children, other.children, strict=False)
        return [pair for ours, theirs in children for pair in pairs_of_leaves(ours, theirs)]
    return []


def in_words(tree: Tree, leaves: Sequence[Tensor]) -> str:
    """A call or an output for a message: `(float32[2, 3, 8, 8], mask=None)` without the names."""
    if isinstance(tree, Leaf):
        x = leaves[tree.index]
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else str(x)
    if isinstance(tree, Constant):
        return repr(tree.value)
    children = [in_words(child, leaves) for child in tree.children]
    if tree.keys:
        children = [f"{key}={child}" for key, child in zip(tree.keys, children, strict=True)]
    name = "" if tree.cls in (tuple, list, dict) else tree.cls.__name__
    return f"{name}({', '.join(children)})"
