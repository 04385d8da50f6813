"""Softmax attention between its projections: qkv -> heads -> attention -> heads joined, as one fused module.

How a model writes the splitting into heads (reshape and permute, three projections, chunks, nn.MultiheadAttention)
does not matter: `moves.py` tells where each number goes.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from depthfuse.acceleration.planning import aten, moves
from depthfuse.acceleration.planning.graph import (
    attribute_of,
    constant_of,
    free_name,
    insert_fused,
    mark_value,
    new_call,
)
from depthfuse.acceleration.planning.rows import lift_linears
from depthfuse.acceleration.planning.sizes import UnknownCondition
from depthfuse.fused.blocks import FusedAttention

ATEN = torch.ops.aten
_PLAIN = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}


def _attentions(plan: fx.GraphModule) -> list[fx.Node]:
    """Those without masks, over heads [B, H, N, D] of one shape."""
    found = []
    for node in plan.graph.nodes:
        if aten.name_of(node) != "scaled_dot_product_attention":
            continue
        given = aten.arguments(node)
        parts = [given[name] for name in ("query", "key", "value")]
        shapes = {aten.shape_of(part) for part in parts}
        plain = all(given[name] == usual for name, usual in _PLAIN.items())
        if plain and len(shapes) == 1 and len(next(iter(shapes)) or ()) == 4:
            found.append(node)
    return found


def join_projections(plan: fx.GraphModule) -> None:
    """Make one linear layer of three that give query, key and value of one attention from the same input."""
    for attend in _attentions(plan):
        sources = [moves.source_of(part)[0] for part in attend.args[:3]]
        if len(set(sources)) != 3 or not all(aten.name_of(node) == "linear" for node in sources):
            continue
        given = [aten.arguments(node) for node in sources]
        weights = [constant_of(each["weight"]) for each in given]
        biases = [constant_of(each["bias"]) for each in given]
        same = len({each["input"] for each in given}) == 1 and len({aten.shape_of(n) for n in sources}) == 1
        known = all(w is not None and w.dim() == 2 for w in weights) and all(
            b is not None or each["bias"] is None for b, each in zip(biases, given, strict=True)
        )
        if not same or not known or len({w.dtype for w in weights if w is not None}) != 1:
            continue
        _join(plan, sources, given)


def _join(plan: fx.GraphModule, sources: list[fx.Node], given: list[dict]) -> None:
    width = weight_of(given[0]["weight"]).shape[0]
    first = min(sources, key=list(plan.graph.nodes).index)
    with plan.graph.inserting_before(first):
        weight = _stacked(plan, [each["weight"] for each in given], width)
        bias = None
        if any(each["bias"] is not None for each in given):
            bias = _stacked(plan, [each["bias"] for each in given], width, like=weight)
        joined = plan.graph.call_function(ATEN.linear.default, (given[0]["input"], weight, bias))
        value = first.meta["val"]
        joined.meta = {**first.meta, "val": value.new_empty((*value.shape[:-1], 3 * width))}
        for index, node in enumerate(sources):
            piece = new_call(
                plan.graph, ATEN.slice.Tensor, (joined, -1, index * width, (index + 1) * width), node
            )
            mark_value(piece, node)
            node.replace_all_uses_with(piece)
    for node in sources:
        plan.graph.erase_node(node)


def weight_of(node: fx.Node) -> Tensor:
    tensor = constant_of(node)
    assert tensor is not None
    return tensor


def _stacked(plan: fx.GraphModule, parts: list, width: int, like: fx.Node | None = None) -> fx.Node:
    """One constant of three; for a bias that is None, zeros."""
    name = free_name(plan, "joined", prefix="")

    def stack(read) -> Tensor:
        known = [read(part) for part in parts if part is not None]
        rows = [known[0].new_zeros(width) if part is None else read(part) for part in parts]
        return torch.cat(rows)

    plan.register_buffer(name, stack(lambda node: attribute_of(plan, node.target).detach()))
    node = plan.graph.get_attr(name)
    example = next(part for part in parts if part is not None)
    node.meta = {key: value for key, value in example.meta.items() if key != "exact"}
    shape = (3 * width, *example.meta["val"].shape[1:])
    node.meta["val"] = example.meta["val"].new_empty(shape)
    if "exact" in example.meta:
        node.meta["exact"] = stack(constant_of)
    return node


def fuse_attention(plan: fx.GraphModule, backend: str) -> None:
    """Attention whose query, key and value are thirds of one value [B, N, 3 * H * D] -> FusedAttention.

    Runs before the linear layers around it become fused modules.
    """
    join_projections(plan)
    lift_linears(plan)
    for attend in _attentions(plan):
        given = aten.arguments(attend)
        _, heads, _, head_dim = aten.shape_of(attend) or ()
        qkv, chains = _common_source(attend)
        dtype = aten.dtype_of(attend)
        if qkv is None or not isinstance(heads, int) or not isinstance(head_dim, int) or dtype is None:
            continue
        shape = aten.shape_of(qkv) or ()
        if len(shape) != 3 or shape[2] != 3 * heads * head_dim or not dtype.is_floating_point:
            continue
        if not _are_thirds(attend, qkv, chains, heads, head_dim):
            continue
        device = attend.meta["val"].device
        like = torch.empty(0, dtype=dtype, device=device)
        module = FusedAttention(like, heads=heads, scale=given["scale"], backend=backend)
        graph = plan.graph
        with graph.inserting_before(attend):
            joined = insert_fused(plan, module, (qkv,), (attend,))
            value = attend.meta["val"]
            joined.meta["val"] = value.new_empty((value.shape[0], value.shape[2], heads * head_dim))
            split = new_call(graph, ATEN.unflatten.int, (joined, -1, [heads, head_dim]), attend)
            split.meta["val"] = value.new_empty((value.shape[0], value.shape[2], heads, head_dim))
            back = new_call(graph, ATEN.transpose.int, (split, 1, 2), attend)
        mark_value(back, attend)
        attend.replace_all_uses_with(back)
        graph.erase_node(attend)
    plan.graph.eliminate_dead_code()
    moves.collapse(plan)
    lift_linears(plan)


def _common_source(attend: fx.Node) -> tuple[fx.Node | None, list[list[fx.Node]]]:
    found = [moves.source_of(part) for part in attend.args[:3]]
    sources = {source for source, _ in found}
    return (sources.pop() if len(sources) == 1 else None), [chain for _, chain in found]


def _are_thirds(
    attend: fx.Node, qkv: fx.Node, chains: list[list[fx.Node]], heads: int, head_dim: int
) -> bool:
    """Whether query, key and value are the three thirds of `qkv`, split into heads."""
    trials = moves.trial_sizes([qkv, attend])
    try:
        for symbols in trials:
            batch, tokens, _ = moves.shape_at(qkv, symbols)
            start = moves.numbered((batch, tokens, 3 * heads * head_dim))
            thirds = start.view(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
            for third, chain in zip(thirds, chains, strict=True):
                if not torch.equal(moves.moved(start, qkv, chain, symbols), third):
                    return False
    except (RuntimeError, ValueError, UnknownCondition):
        return False
    return bool(trials)
