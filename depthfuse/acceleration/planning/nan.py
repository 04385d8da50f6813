"""Which plans may make NaN of numbers that are finite: some implementations turn a NaN before a ReLU into zero, and the
inputs of a call do not tell.
"""

from __future__ import annotations

from torch import fx, nn

from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.moves import is_move

_MAKERS_WORDS = "log log2 log10 log1p sqrt rsqrt pow acos asin acosh atanh logit fmod remainder xlogy"
_NOT_NEGATIVE_WORDS = "linalg_vector_norm norm abs relu relu6 sigmoid softmax exp square var hardsigmoid"
_KEEP_THE_SIGN_WORDS = "mean sum amax amin expand expand_as clone max_pool2d adaptive_avg_pool2d"
_MAKERS = frozenset(_MAKERS_WORDS.split())
_NOT_NEGATIVE = frozenset(_NOT_NEGATIVE_WORDS.split())
_KEEP_THE_SIGN = frozenset(_KEEP_THE_SIGN_WORDS.split())


def makes_nan(module: nn.Module) -> bool:
    """Whether any operator of the graphs in `module` divides by what may be zero, takes a root of what may be negative,
    or the like. Fused modules and norms, whose denominators are positive, do not.
    """
    graphs = [inner for inner in module.modules() if isinstance(inner, fx.GraphModule)]
    return any(_makes_nan(node) for graph in graphs for node in graph.graph.nodes)


def _makes_nan(node: fx.Node) -> bool:
    name = aten.name_of(node)
    if name in ("div", "true_divide", "reciprocal"):
        divisor = node.args[0] if name == "reciprocal" else node.args[1]
        return isinstance(divisor, fx.Node) and not aten.is_number(divisor) and not _is_positive(divisor)
    if name in ("sqrt", "log1p"):
        return not _is_not_negative(node.args[0])
    if name == "pow" and node.args[1] in (2, 3, 4):
        return False
    if name in ("rsqrt", "log", "log2", "log10"):
        return not _is_positive(node.args[0])
    return name in _MAKERS


def _is_positive(node: object) -> bool:
    name = aten.name_of(node)
    if not isinstance(node, fx.Node) or not name:
        return False
    if is_move(node) or name in ("expand", "expand_as", "clone"):
        return _is_positive(node.args[0])
    numbers = [argument for argument in node.args[1:] if isinstance(argument, int | float)]
    if name in ("clamp_min", "clamp"):
        return bool(numbers) and numbers[0] > 0
    return name == "add" and bool(numbers) and numbers[0] > 0 and _is_not_negative(node.args[0])


def _is_not_negative(node: object) -> bool:
    name = aten.name_of(node)
    if not isinstance(node, fx.Node) or not name:
        return False
    if is_move(node) or name in _KEEP_THE_SIGN:
        return _is_not_negative(node.args[0])
    if name == "pow":
        return node.args[1] in (2, 4)
    if name == "mul" and node.args[0] is node.args[1]:
        return True
    return name in _NOT_NEGATIVE or _is_positive(node)
