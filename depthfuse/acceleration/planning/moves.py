"""What moves numbers about without changing them: reshapes, permutations, pieces. Known by where each number goes.

Two chains of such operators do the same if they put the numbers 0, 1, 2, ... into the same places, however they are
written. That is tried at the example's sizes and at others, so that no coincidence of sizes counts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.graph import mark_value, origin_of, value_name
from depthfuse.acceleration.planning.sizes import UnknownCondition, evaluate

_MOVES_WORDS = """
    reshape view permute transpose t select squeeze unsqueeze flatten unflatten slice unbind split
    split_with_sizes chunk contiguous movedim swapaxes narrow
"""
_MOVES = frozenset(_MOVES_WORDS.split())
_LARGEST = 2**24  # numbers to try a chain with


def is_move(node: object) -> bool:
    """Whether a node moves the numbers of its first argument, or takes a piece of what one gave that cuts it up."""
    found = aten.item_of(node)
    if found is not None:
        return aten.name_of(found[0]) in ("unbind", "split", "split_with_sizes", "chunk")
    return aten.name_of(node) in _MOVES


def source_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Where the numbers of a node come from: the first node that moves none, and the moves from there, in order."""
    moves: list[fx.Node] = []
    while is_move(node):
        moves.insert(0, node)
        node = node.args[0]
    return node, moves


def trial_sizes(nodes: Sequence[fx.Node]) -> list[dict[str, int]]:
    """Values for all symbols in the shapes of `nodes`: those of the example, and others."""
    hints: dict[str, int] = {}
    for node in nodes:
        for size in aten.value_of(node).shape if aten.value_of(node) is not None else ():
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    hint = size.node.shape_env.backed_var_to_val.get(symbol)
                    hints[str(symbol)] = int(hint) if hint is not None else 0
    if not all(hints.values()):
        return []  # a size that depends on data
    return [hints, {name: 2 * value for name, value in hints.items()}] if hints else [{}]


def shape_at(node: fx.Node, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a node's value for given symbols. Raises UnknownCondition where that cannot be told."""
    return tuple(n if isinstance(n, int) else evaluate(n, symbols) for n in aten.shape_of(node) or ())


def moved(start: Tensor, source: fx.Node, moves: Sequence[fx.Node], symbols: Mapping[str, int]) -> Tensor:
    """What `moves` make of `start`, which stands for the value of `source`.

    Raises RuntimeError, ValueError or UnknownCondition where they do not fit together at these sizes.
    """
    values: dict[fx.Node, Any] = {source: start}

    def number(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value in values:
            return values[value]
        size = value.meta["val"]
        return size if isinstance(size, int) else evaluate(str(size.node.expr), symbols)

    for node in moves:
        args = fx.map_arg(node.args, number)
        kwargs = fx.map_arg(node.kwargs, number)
        values[node] = (
            operator.getitem(*args) if node.target is operator.getitem else node.target(*args, **kwargs)
        )
    return values[moves[-1]] if moves else start


def numbered(shape: Sequence[int]) -> Tensor:
    """0, 1, 2, ... in a tensor. Raises ValueError for one that is too large to try."""
    if math.prod(shape) > _LARGEST:
        raise ValueError("too large to try")
    return torch.arange(math.prod(shape), dtype=torch.int32).view(tuple(shape))


def collapse(plan: fx.GraphModule) -> None:
    """Take out chains of moves that leave every number where it was."""
    for node in list(plan.graph.nodes):
        if not is_move(node) or aten.value_of(node) is None or not node.users:
            continue
        if len(node.users) == 1 and is_move(next(iter(node.users))):
            continue  # its reader's chain is longer
        source, moves = source_of(node)
        if len(moves) > 1 and aten.shape_of(source) == aten.shape_of(node) and _stays(source, moves):
            node.replace_all_uses_with(source)
            if source.op == "call_module" and value_name(source) == source.name:
                # It gives what no node of the program does by itself; this one is the next that can be compared.
                origin = origin_of(source)
                source.meta["origin"] = replace(origin, nodes=(*origin.nodes, value_name(node)))
                mark_value(source, node)
    plan.graph.eliminate_dead_code()


def _stays(source: fx.Node, moves: list[fx.Node]) -> bool:
    trials = trial_sizes([source, *moves])
    try:
        for symbols in trials:
            start = numbered(shape_at(source, symbols))
            if not torch.equal(moved(start, source, moves, symbols), start):
                return False
    except (RuntimeError, ValueError, UnknownCondition):
        return False
    return bool(trials)
