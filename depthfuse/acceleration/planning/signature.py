"""How a model is called: its arguments by name, so that positional and keyword calls are the same call."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_REQUIRED = "<required>"
_POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")


@dataclass(frozen=True)
class Signature:
    """Names, kinds (those of `inspect.Parameter`) and defaults of a model's arguments, as plain values.

    A default that a file cannot hold counts as not given: it is left to the model.
    """

    parameters: tuple[tuple[str, str, Any], ...]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """Of `model.forward`. One whose signature Python cannot tell takes anything."""
        # `functools.wraps` of a bound method names one argument less than such a function takes.
        wrapped = getattr(getattr(function, "__func__", None), "__wrapped__", None)
        follow = not isinstance(wrapped, types.MethodType)
        try:
            found = inspect.signature(function, follow_wrapped=follow).parameters.values()
        except (TypeError, ValueError):
            return cls((("args", "VAR_POSITIONAL", _REQUIRED), ("kwargs", "VAR_KEYWORD", _REQUIRED)))
        return cls(
            tuple(
                (
                    p.name,
                    p.kind.name,
                    _REQUIRED if p.default is inspect.Parameter.empty else _plain(p.default),
                )
                for p in found
            )
        )

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The same call with as many arguments by position as can be, defaults filled in as far as they are plain.

        Raises TypeError for what such a function does not take.
        """
        given, rest = list(args), dict(kwargs)
        by_position: list[Any] = []
        by_name: dict[str, Any] = {}
        open_ended = False  # a default that only the model knows: what follows goes by name
        for name, kind, default in self.parameters:
            if kind == "VAR_POSITIONAL":
                by_position += given
                given = []
            elif kind == "VAR_KEYWORD":
                by_name |= rest
                rest = {}
            elif kind in _POSITIONAL and given:
                if name in rest and kind != "POSITIONAL_ONLY":
                    raise TypeError(f"forward() got multiple values for argument {name!r}")
                by_position.append(given.pop(0))
            elif name in rest and kind != "POSITIONAL_ONLY":
                if kind == "KEYWORD_ONLY" or open_ended:
                    by_name[name] = rest.pop(name)
                else:
                    by_position.append(rest.pop(name))
            elif isinstance(default, str) and default == _REQUIRED:
                raise TypeError(f"forward() is missing the argument {name!r}")
            elif isinstance(default, _Unknown):
                open_ended = True
            elif kind == "KEYWORD_ONLY" or open_ended:
                by_name[name] = default
            else:
                by_position.append(default)
        if given:
            raise TypeError(f"forward() takes {len(by_position)} arguments by position, got {len(args)}")
        if rest:
            raise TypeError(f"forward() got an unexpected argument {next(iter(rest))!r}")
        return tuple(by_position), by_name


@dataclass(frozen=True)
class _Unknown:
    """The default of an argument that no file holds."""


UNKNOWN = _Unknown()


def _plain(default: Any) -> Any:
    plain = default is None or type(default) in (bool, int, float, str)
    return default if plain and default != _REQUIRED else UNKNOWN


def signature_of(model: nn.Module) -> Signature:
    """Of a model's `forward`, the instance's own where it has one."""
    return Signature.of(model.forward)
