"""Candidates of blocks that end in a feed-forward branch, some of whose hidden units lose their activation: "idle"
most of them, after RePaViT (Xu et al., ICML 2025, arXiv 2505.21847), "no_act" all.

    ... (+) norm fc1 [act | act of some, BN of the others] fc2 (+)

From fc1 to fc2, what has no activation is one linear layer of D x D weights; beside it stays a narrower branch. All
else stays as it is, the block's norms included: nothing is folded into them, so that they need not become batch norms,
and no activation comes after the sum. Of `ffn` that is the milder form, and it saves less.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from depthfuse.merging.adapters.base import Candidate, Lambda, fixed, mix, own_activation, register
from depthfuse.merging.adapters.feed_forward import BranchLayers
from depthfuse.merging.adapters.feed_forward_candidates import standing_in
from depthfuse.merging.adapters.feed_forward_reading import feed_forward_of
from depthfuse.merging.adapters.structure import NoBlock, Unread
from depthfuse.merging.adapters.vit import TRANSFORMER_BLOCKS
from depthfuse.merging.algebra import LinearConv, compose, norm_affine
from depthfuse.merging.merged_blocks import MergedIdle, PartlyIdle


@register(*TRANSFORMER_BLOCKS)
class IdleHidden(Candidate):
    """A quarter of the hidden units keep their activation: those whose weights are the largest."""

    name = "idle"
    active_share: ClassVar[float] = 0.25

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        try:
            where = feed_forward_of(block)
        except (NoBlock, Unread) as problem:
            return f"its feed-forward branch cannot be followed ({problem})"
        read, hidden, given = where.layers(block).channels
        idle = hidden - cls._active_count(hidden)
        if read * given >= idle * (read + given):
            return (
                f"one linear layer of {given}x{read} is no less than the {idle} hidden units that it replaces"
            )
        return None

    @classmethod
    def _active_count(cls, hidden: int) -> int:
        return int(hidden * cls.active_share)

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.where = feed_forward_of(block)
        layers = self.where.layers(block)
        _, hidden, _ = layers.channels
        # what a unit at most adds to the branch
        size = layers.fc1.weight.detach().flatten(1).norm(dim=1)
        size = size * layers.fc2.weight.detach().flatten(1).norm(dim=0)
        self.register_buffer("largest_first", size.argsort(descending=True, stable=True))
        self.norm_mid = layers.new_norm(hidden)

    def _parts(self) -> tuple[Tensor, Tensor]:
        """(the hidden units with an activation, those without one)."""
        count = self._active_count(len(self.largest_first))
        return self.largest_first[:count], self.largest_first[count:]

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, **others: Any
    ) -> Any:  # what the block returns
        layers = self.where.layers(block)
        act = own_activation(layers.act)
        active = torch.zeros_like(self.largest_first, dtype=torch.bool).index_fill(0, self._parts()[0], True)
        if isinstance(layers.fc1, nn.Conv2d):
            active = active.view(-1, 1, 1)

        def some_active(h: Tensor) -> Tensor:
            kept, normed = act(h), self.norm_mid(h)
            idle = normed if fixed(lam, 0.0) else mix(lam, kept, normed)
            return torch.where(active, kept, idle)

        with standing_in({layers.act: some_active}):
            return block(x, **others)

    def merge(self, block: nn.Module) -> nn.Module:
        own = copy.deepcopy(block)
        first, second = (step.path for step in self.where.steps if step.kind == "linear")
        act = next(step.path for step in self.where.steps if step.kind == "act")
        own.set_submodule(first, self._merged_branch(self.where.layers(block)))
        for path in (act, second):
            own.set_submodule(path, nn.Identity())
        return MergedIdle(own, first)

    def _merged_branch(self, layers: BranchLayers) -> PartlyIdle:
        convolution = isinstance(layers.fc1, nn.Conv2d)
        read = LinearConv.from_conv if convolution else LinearConv.from_linear
        fc1, fc2 = read(layers.fc1), read(layers.fc2)

        def layer(linear: LinearConv) -> nn.Module:
            like = layers.fc1.weight
            return linear.to_conv(like) if convolution else linear.to_linear(like)

        active, idle = self._parts()
        rows = fc1.scaled(*norm_affine(self.norm_mid))
        rows = replace(rows, weight=rows.weight[idle], bias=rows.bias[idle])
        linear = layer(compose(replace(fc2, weight=fc2.weight[:, idle]), rows))
        if not len(active):
            return PartlyIdle(linear)
        into = layer(replace(fc1, weight=fc1.weight[active], bias=fc1.bias[active]))
        out = layer(replace(fc2, weight=fc2.weight[:, active], bias=torch.zeros_like(fc2.bias)))
        return PartlyIdle(linear, into, copy.deepcopy(layers.act), out)


@register(*TRANSFORMER_BLOCKS)
class NoActivation(IdleHidden):
    """No hidden unit keeps its activation: the branch is norm -> one linear layer."""

    name = "no_act"
    active_share = 0.0
