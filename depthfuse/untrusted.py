"""Every file is untrusted: JSON is read within bounds, and what it holds is checked against a shape before it is used.

A damaged or crafted file costs one error of ours, and neither much time nor much memory.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError

# What code that takes a document apart raises where the document is not what the code expects. Blocks that catch it
# contain nothing but such code, and turn it into an error of ours that names the file.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError too
    SafetensorError,
    TypeError,
    ValueError,  # JSONDecodeError and UnicodeError too
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine ran out of memory, of which the file that was read is not guilty."""
    return (
        isinstance(error, MemoryError) or "out of memory" in str(error) or "not enough memory" in str(error)
    )


# The largest of ours are histories of hundreds of epochs, under 2 MB.
MAX_JSON_BYTES = 4 * 2**20
# Ours reach 12; Python's own recursion ends near 1000.
MAX_DEPTH = 100
_MAX_INTEGER = 2**63


class Positive(float):
    """In a shape: a number above zero."""


class Either(tuple):
    """In a shape: one of several, where they are no types; `Either(shape, shape)`."""

    def __new__(cls, *shapes: Any) -> Either:
        return super().__new__(cls, shapes)


def parse_json(text: bytes | str, *, strict_numbers: bool = True, at_most: int = MAX_JSON_BYTES) -> Any:
    """JSON within bounds of size and depth, without repeated keys.

    Args:
        text: UTF-8. strict_numbers: refuse NaN, infinities and integers beyond 64 bits.

    Raises:
        ValueError: anything else; the message says what is wrong, not where it came from.
    """
    if len(text) > at_most:
        raise ValueError(f"{len(text)} bytes of JSON, where {at_most} are the most")
    try:
        document = json.loads(
            text if isinstance(text, str) else text.decode(), object_pairs_hook=_without_repetition
        )
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    check_plain(document, strict_numbers=strict_numbers)
    return document


def check_plain(document: Any, *, strict_numbers: bool = True) -> None:
    """Raise ValueError where a document is nested too deep, or holds numbers or strings that are of no use."""
    level, depth = [document], 1
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            elif isinstance(value, str):
                value.encode()  # a lone surrogate cannot be written or shown
            elif strict_numbers and isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{value}, where numbers are finite")
            elif strict_numbers and isinstance(value, int) and abs(value) >= _MAX_INTEGER:
                raise ValueError("an integer of more than 64 bits")
        level, depth = below, depth + 1


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"the key {key!r:.60} twice in one object")
        document[key] = value
    return document


def conform(value: Any, shape: Any, place: str = "the document") -> None:
    """Raise ValueError, naming the place, unless a JSON document has a shape.

    shape: Any; a type (float takes integers, int and float take no booleans); `Positive`; a union or None; a Literal;
    `Either`; [shape], a list; dict[str, shape]; or {key: shape}, an object with at least these keys. A key that ends
    in "?" may be missing, and "*" stands for all keys that are not named.
    """
    if shape is Any:
        return
    origin, inner = typing.get_origin(shape), typing.get_args(shape)
    if isinstance(shape, Mapping):
        _conform_record(value, shape, place)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{place} is {_named(value)}, where a list is expected")
        for index, item in enumerate(value):
            conform(item, shape[0], f"{place}[{index}]")
    elif origin is dict:
        _conform_record(value, {"*": inner[1]}, place)
    elif origin is typing.Literal:
        if not any(type(value) is type(known) and value == known for known in inner):
            raise ValueError(
                f"{place} is {_named(value)}, where one of {', '.join(map(repr, inner))} is expected"
            )
    elif isinstance(shape, Either):
        _conform_any(value, shape, place)
    elif origin in (types.UnionType, typing.Union):
        _conform_any(value, inner, place)
    elif shape is Positive:
        conform(value, float, place)
        if not value > 0:
            raise ValueError(f"{place} is {value}, where a number above zero is expected")
    elif shape in (None, types.NoneType):
        if value is not None:
            raise ValueError(f"{place} is {_named(value)}, where null is expected")
    else:
        kinds = int | float if shape is float else shape
        if not isinstance(value, kinds) or (isinstance(value, bool) and shape is not bool):
            raise ValueError(f"{place} is {_named(value)}, where {shape.__name__} is expected")


def _conform_record(value: Any, shape: Mapping[str, Any], place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {_named(value)}, where an object is expected")
    named = {key.removesuffix("?"): inner for key, inner in shape.items() if key != "*"}
    missing = [key for key in shape if key != "*" and not key.endswith("?") and key not in value]
    if missing:
        raise ValueError(f"{place} lacks {missing[0]!r}")
    for key, item in value.items():
        if key in named or "*" in shape:
            conform(item, named.get(key, shape.get("*")), f"{place}.{key:.60}")


def _conform_any(value: Any, shapes: tuple[Any, ...], place: str) -> None:
    failed = None
    for shape in shapes:
        try:
            conform(value, shape, place)
            return
        except ValueError as error:
            failed = failed or error
    assert failed is not None
    raise failed


def _named(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
