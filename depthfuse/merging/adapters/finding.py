"""Which blocks of a model can be pruned, and how: by class where it is known, else by structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from depthfuse.merging.adapters.base import Candidate, known_candidates
from depthfuse.merging.adapters.feed_forward_candidates import (
    FeedForwardAttention,
    FeedForwardDrop,
    FeedForwardFfn,
    FeedForwardLinear,
)
from depthfuse.merging.adapters.feed_forward_reading import feed_forward_of
from depthfuse.merging.adapters.found import candidates_of
from depthfuse.merging.adapters.idle import IdleHidden, NoActivation
from depthfuse.merging.adapters.rows import pairs_of
from depthfuse.merging.adapters.structure import NoBlock, Unread
from depthfuse.merging.computed_weights import foreign_hook, plain_type
from depthfuse.merging.tracing import alone

# of a block that is found by its feed-forward branch
FEED_FORWARD = (
    FeedForwardFfn,
    FeedForwardAttention,
    FeedForwardLinear,
    IdleHidden,
    NoActivation,
    FeedForwardDrop,
)


@dataclass(frozen=True)
class BlockInfo:
    """What depthfuse knows of one block of a model."""

    path: str
    block_type: str
    candidates: tuple[type[Candidate], ...]  # empty: not prunable
    reason: str  # why not prunable, or why some candidates are missing
    length: int = 1  # how many layers of an nn.Sequential the block is, from the one at `path`


@alone
def find_blocks(model: nn.Module) -> list[BlockInfo]:
    """All blocks of a model in order, prunable or not, each with the reason.

    A block is a module of a class that depthfuse knows, or the largest one that computes a residual branch or a chain
    of convolutions (`reading.py`) and holds no block of a known class, or one that ends in a feed-forward branch
    (`feed_forward_reading.py`) and holds no other, or two neighbouring convolutions of a long plain row (`rows.py`).
    Listed as one that cannot be pruned is what would be one but for something in its way, and what stands in a
    numbered row (element of an `nn.Sequential` or `nn.ModuleList`, or "b1", "b2", ...) and holds two convolutions or
    linear layers, but no such block. A model without any gives an empty list.
    """
    found: list[BlockInfo] = []

    def visit(module: nn.Module, path: str, numbered: bool) -> bool:
        kind = plain_type(module)
        known = known_candidates(kind)
        if known:
            found.append(_info(module, path, known))
            return True
        reason, before = "", len(found)
        if path and _may_be_block(module):
            try:
                found.append(_info(module, path, candidates_of(module)))
                return True
            except NoBlock:
                pass
            except Unread as problem:
                reason = str(problem)
        container = isinstance(module, nn.Sequential | nn.ModuleList)
        children = module.named_children()
        inner = [visit(m, f"{path}.{n}" if path else n, container or n[-1:].isdigit()) for n, m in children]
        found.extend(_rows(module, path))
        inside = any(info.candidates for info in found[before:])
        if path and not inside and _products(module) > 1 and _may_be_block(module):
            try:
                feed_forward_of(module, anew=True)
                found[before:] = [_info(module, path, FEED_FORWARD)]
                return True
            except NoBlock:
                pass
            except Unread as problem:
                if not any(inner):  # else what was found inside has the better reason
                    reason = reason or str(problem)
        if reason and not inside:
            del found[before:]  # parts of what could have been a block
        elif inside or any(inner):
            return True
        if reason or (numbered and not kind.__module__.startswith("torch.nn.") and _products(module) > 1):
            found.append(BlockInfo(path, kind.__name__, (), reason or _unknown(module)))
            return True
        return False

    visit(model, "", False)
    return found


def _unknown(module: nn.Module) -> str:
    if callable(getattr(module, "reparameterize", None)):
        return "branches that are to become one: call timm.utils.reparameterize_model first"
    return "unknown block type"


def _rows(module: nn.Module, path: str) -> list[BlockInfo]:
    """Neighbouring convolutions of a long plain row."""
    infos = []
    for first, layers in pairs_of(module):
        try:
            info = _info(layers, f"{path}.{first}" if path else first, candidates_of(layers))
        except Unread:
            continue
        infos.append(dataclasses.replace(info, block_type="two convolutions", length=len(layers)))
    return infos


def _products(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())


def _may_be_block(module: nn.Module) -> bool:
    """Whether to read a module's structure: not where a part of it is a block of a known class."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or not any(True for _ in module.children()):
        return False
    if isinstance(module, nn.Sequential) and len(module) == 1:  # what is inside has the better name
        return False
    return not any(known_candidates(plain_type(part)) for part in module.modules())


def _info(module: nn.Module, path: str, candidates: Sequence[type[Candidate]]) -> BlockInfo:
    name = plain_type(module).__name__
    hooked = foreign_hook(module)
    if hooked is not None:
        return BlockInfo(path, name, (), f"{hooked} has a forward hook, which a merged block would not call")
    refusals = {c.name: c.refusal(module) for c in candidates}
    usable = tuple(c for c in candidates if refusals[c.name] is None)
    if not any(c.alone for c in usable):
        usable = ()
    reasons = [f"{name}: {why}" if usable else why for name, why in refusals.items() if why]
    return BlockInfo(path, name, usable, "; ".join(dict.fromkeys(reasons)))
