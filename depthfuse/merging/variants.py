"""The merged models of a supernet that are worth telling apart: one for each kind of block and way of merging it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from depthfuse.merging.computed_weights import compute_weights, private_copy
from depthfuse.merging.folding import fold_batch_norms
from depthfuse.merging.merge import fuse_switches
from depthfuse.merging.supernet import Supernet, SwitchBlock
from depthfuse.merging.tracing import alone
from depthfuse.spec import KEEP

# Rates of dropout and stochastic depth: they differ from block to block, and mean nothing in evaluation mode.
_TRAINING_ONLY = re.compile(r"\b(?:drop_prob|p)=[\d.e-]+")


@dataclass(frozen=True)
class Variant:
    """All blocks of the same structure and shapes, kept as well as merged in one way."""

    candidate: str
    paths: tuple[str, ...]

    def choices(self) -> dict[str, str]:
        """The subnet in which these blocks are merged, and no other."""
        return dict.fromkeys(self.paths, self.candidate)


@alone
def kept_copy(supernet: Supernet) -> Supernet:
    """A copy in evaluation mode with every block kept; the original is left alone."""
    net = private_copy(supernet).eval()
    net.set_choices({})
    return net


@alone
def variants_of(net: Supernet, x: Tensor) -> list[Variant]:
    """The variants of `net` for inputs like x; `net` is a `kept_copy`, and is one again afterwards."""
    given = block_inputs(net, x)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path, block in net.blocks.items():
        kept = signature(block.block, given[path])
        for name in block.candidates:
            block.choice = name
            merged = signature(block.fuse(), given[path])
            groups.setdefault((kept, name, merged), []).append(path)
        block.choice = KEEP
    return [Variant(name, tuple(paths)) for (_, name, _), paths in groups.items()]


@alone
def merged_model(net: Supernet, choices: Mapping[str, str]) -> nn.Module:
    """The merged model of a subnet, with its batch norms folded. Unlike `depthfuse.merge` it checks nothing: what a
    model costs does not depend on its weights, and these may be untrained."""
    net.set_choices(choices)
    model = private_copy(net.model)
    net.set_choices({})
    compute_weights(model)
    fuse_switches(model)
    fold_batch_norms(model)
    return model


@torch.no_grad()
def block_inputs(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each switch block is given when the net sees x: {block path: its input}."""
    given: dict[str, Tensor] = {}

    def hook(module: SwitchBlock, args: tuple[Tensor, ...]) -> None:
        given[module.path] = args[0].clone()  # the block may write over its input

    blocks = [m for m in net.modules() if isinstance(m, SwitchBlock)]
    handles = [m.register_forward_pre_hook(hook) for m in blocks]
    net(x)
    for handle in handles:
        handle.remove()
    return given


def signature(module: nn.Module, example: Tensor) -> str:
    """Equal for modules of the same structure and shapes, whatever their weights."""
    shapes = [(name, list(p.shape)) for name, p in module.state_dict().items()]
    text = json.dumps([_TRAINING_ONLY.sub("", repr(module)), shapes, list(example.shape)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
