"""What models return, as the tensors in it: logits, feature maps, tuples, dictionaries, dataclasses (ModelOutput)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from depthfuse.errors import MergeError

_CONSTANTS = (bool, int, str, bytes, torch.dtype, torch.device, type(None))


def tensors_of(outputs: Any) -> dict[str, Tensor]:
    """{where it stands: tensor}, such as {"['logits']": ...}; constants are part of where the tensors stand.

    Raises MergeError for an object of an unknown class, and for outputs without any tensor.
    """
    found = dict(_visit(outputs, ""))
    if not any(isinstance(value, Tensor) for value in found.values()):
        raise MergeError(
            f"the model returns {_kind(outputs)} without a tensor, so there is nothing to compare merged and unmerged "
            "model by: let its forward return its results"
        )
    constants = "".join(
        f"{where}={value!r} " for where, value in found.items() if not isinstance(value, Tensor)
    )
    return {f"{constants}{where}": value for where, value in found.items() if isinstance(value, Tensor)}


def _visit(value: Any, where: str) -> list[tuple[str, Any]]:
    if isinstance(value, Tensor):
        return [(where, value)]
    if isinstance(value, float):  # computed, so it rounds as tensors do
        return [(where, torch.tensor(value, dtype=torch.float64))]
    if isinstance(value, _CONSTANTS):
        return [(where, value)]
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        raise MergeError(
            f"the model returns {_kind(value)}{f' at {where}' if where else ''}, in which merging cannot find the "
            "tensors to compare: expected tensors, or lists, tuples, dictionaries or dataclasses of them; wrap the "
            "model so that its forward returns one of these"
        )
    return [pair for step, item in items for pair in _visit(item, where + step)]


def _kind(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
