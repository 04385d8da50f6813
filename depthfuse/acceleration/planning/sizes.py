"""For which sizes of its inputs a traced program is right: conditions on symbols, as text, checked without `eval`."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.BitAnd: lambda a, b: bool(a) and bool(b),
    ast.BitOr: lambda a, b: bool(a) or bool(b),
    ast.USub: operator.neg,
    ast.Invert: operator.not_,
    ast.Not: operator.not_,
}
# As torch.utils._sympy.functions names them.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Eq": operator.eq,
    "Ne": operator.ne,
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "TruncToInt": math.trunc,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "ToFloat": float,
    "Identity": lambda a: a,
    "Abs": abs,
    "And": lambda *a: all(a),
    "Or": lambda *a: any(a),
    "Not": operator.not_,
    "RoundToInt": round,
}


class UnknownCondition(ValueError):
    """A condition that is none, or uses a function that is not known here."""


@functools.lru_cache(4096)
def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise UnknownCondition(f"{text!r:.80} is no condition") from error


def evaluate(text: str, symbols: Mapping[str, int]) -> Any:
    """The value of an expression of sizes, like "Ne((s0 - 1)//2, 1)". Raises UnknownCondition for any other."""
    try:
        return _value(_parsed(text), symbols)
    except UnknownCondition:
        raise
    except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise UnknownCondition(f"{text!r:.80}: {error}") from error


def _value(node: ast.expr, symbols: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        return node.value
    if isinstance(node, ast.Name) and node.id in symbols:
        return symbols[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, power = _value(node.left, symbols), _value(node.right, symbols)
        if not 0 <= power <= 16:
            raise UnknownCondition(f"the power {power!r}")
        return base**power
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, symbols), _value(node.right, symbols))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand, symbols))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        return _OPERATORS[type(node.ops[0])](_value(node.left, symbols), _value(node.comparators[0], symbols))
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords
    if is_call and node.func.id in _FUNCTIONS:
        return _FUNCTIONS[node.func.id](*(_value(argument, symbols) for argument in node.args))
    raise UnknownCondition(f"{ast.dump(node)[:80]} is not known in conditions")


@dataclass(frozen=True)
class Sizes:
    """The shapes that a program takes.

    shapes: of each tensor; an entry is a number, the name of a symbol, or an expression of symbols.
    least: {symbol: its least value}, as pairs. conditions: expressions of symbols that have to be true.
    """

    shapes: tuple[tuple[int | str, ...], ...]
    least: tuple[tuple[str, int], ...]
    conditions: tuple[str, ...]

    def symbols(self, shapes: Sequence[Sequence[int]]) -> dict[str, int] | None:
        """The values that shapes give to the symbols, or None for shapes that do not fit."""
        found: dict[str, int] = {}
        names = {name for name, _ in self.least}
        expressions = []
        if len(shapes) != len(self.shapes):
            return None
        for given, expected in zip(shapes, self.shapes, strict=True):
            if len(given) != len(expected):
                return None
            for size, wanted in zip(given, expected, strict=True):
                if isinstance(wanted, int):
                    if size != wanted:
                        return None
                elif wanted in names:
                    if found.setdefault(wanted, size) != size:
                        return None
                else:
                    expressions.append((size, wanted))
        if set(found) != names:
            return None
        return found if all(_holds(f"Eq({text}, {size})", found) for size, text in expressions) else None

    def take(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether the program is right for inputs of these shapes."""
        found = self.symbols(shapes)
        if found is None or any(found[name] < least for name, least in self.least):
            return False
        return all(_holds(text, found) for text in self.conditions)


def _holds(text: str, symbols: Mapping[str, int]) -> bool:
    try:
        return bool(evaluate(text, symbols))
    except UnknownCondition:
        return False  # not known to be true
