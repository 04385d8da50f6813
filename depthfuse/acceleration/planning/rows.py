"""Linear layers work on rows, in whatever order these come: moves of whole rows go behind them.

nn.MultiheadAttention puts the tokens before the batch and back, others make one long list of both. Behind the layer
such moves meet their inverse, and `moves.collapse` takes both out.
"""

from __future__ import annotations

import torch
from torch import fx

from depthfuse.acceleration.planning import aten, moves
from depthfuse.acceleration.planning.graph import mark_value, new_call, origin_of
from depthfuse.acceleration.planning.sizes import UnknownCondition

ATEN = torch.ops.aten
_RESHAPES = frozenset(("reshape", "view", "flatten", "unflatten", "reshape_as", "view_as"))


def keeps_rows(node: fx.Node, value: object) -> bool:
    """Whether `node` is `value` with its leading axes in another form: the rows along the last axis stay, in order."""
    if aten.name_of(node) not in _RESHAPES or node.args[0] is not value:
        return False
    before, after = aten.shape_of(value) or (), aten.shape_of(node) or ()
    # With the last axis kept and no number lost, a reshape keeps the order of the rows.
    return bool(before and after) and isinstance(after[-1], int) and before[-1] == after[-1]


def lift_linears(plan: fx.GraphModule) -> None:
    """Write linear(moved(x)) as moved(linear(x)), where whole rows are moved."""
    for node in list(plan.graph.nodes):
        if aten.name_of(node) != "linear":
            continue
        source, chain = moves.source_of(node.args[0])
        shape = aten.shape_of(source) or ()
        if not chain or len(shape) != 3 or not isinstance(shape[-1], int):
            continue  # tokens; the flattening before a classifier stays where it is looked for
        swaps = _moves_rows(source, chain)
        if swaps is None:
            continue
        if swaps:
            shape = (shape[1], shape[0], *shape[2:])
        sizes = [] if aten.shape_of(chain[-1]) == shape else _sizes(node, chain[-1])
        if sizes is not None:
            _lift(plan, node, source, swaps, sizes)
    plan.graph.eliminate_dead_code()
    moves.collapse(plan)


def _lift(plan: fx.GraphModule, node: fx.Node, source: fx.Node, swaps: bool, sizes: list) -> None:
    graph = plan.graph
    before, after = source.meta["val"], node.meta["val"]
    with graph.inserting_before(node):
        value = new_call(graph, node.target, (source, *node.args[1:]), node)
        value.meta["val"] = before.new_empty((*before.shape[:-1], after.shape[-1]))
        value.meta["origin"] = origin_of(node)
        if swaps:
            value = new_call(graph, ATEN.transpose.int, (value, 0, 1), node)
            value.meta["val"] = value.args[0].meta["val"].transpose(0, 1)
        if sizes:
            value = new_call(graph, ATEN.reshape.default, (value, sizes), node)
    mark_value(value, node)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _sizes(node: fx.Node, last: fx.Node) -> list | None:
    """The shape of a linear layer's value for a reshape; None where its open sizes are not at hand."""
    shape = list(aten.shape_of(node) or ())
    if sum(isinstance(size, str) for size in shape) <= 1:
        return [-1 if isinstance(size, str) else size for size in shape]
    if aten.name_of(last) in ("reshape", "view"):
        return [*last.args[1][:-1], shape[-1]]
    return None


def _moves_rows(source: fx.Node, chain: list[fx.Node]) -> bool | None:
    """Whether a chain keeps the order of the rows of `source` (False), or swaps its first two axes (True); None where
    it does anything else.
    """
    possible = [False, True]
    trials = moves.trial_sizes([source, *chain])
    try:
        for symbols in trials:
            start = moves.numbered(moves.shape_at(source, symbols))
            end = moves.moved(start, source, chain, symbols)
            if end.shape[-1] != start.shape[-1] or end.numel() != start.numel():
                return None
            rows = end.reshape(-1, end.shape[-1])
            wanted = {False: start, True: start.transpose(0, 1)}
            possible = [s for s in possible if torch.equal(rows, wanted[s].reshape(rows.shape))]
    except (RuntimeError, ValueError, UnknownCondition):
        return None
    return possible[0] if trials and possible else None
