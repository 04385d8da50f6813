"""Candidates of blocks that end in a feed-forward branch, whatever comes before it: Swin, Mixer, PoolFormer, CaiT, a
user's own.

They are those of a ViT (`vit.py`), with the block's own code in the place of the attention:

    ... (+) [norm | BN] fc1 [act | BN] fc2 [norm | BN] (+) [- | act BN]

What comes before the branch stays as it is, its LayerNorms included. To prune the branch inside the block's code, its
layers compute something else while the block runs; merged, one linear layer is in the place of the first one and
nothing in that of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from depthfuse.merging.adapters.base import Candidate, Lambda, fixed, mix, own_activation
from depthfuse.merging.adapters.drop import Drop
from depthfuse.merging.adapters.feed_forward import FeedForward
from depthfuse.merging.adapters.feed_forward_reading import feed_forward_of
from depthfuse.merging.algebra import LinearConv, add, compose, norm_affine
from depthfuse.merging.merged_blocks import (
    Dropped,
    MergedConv,
    MergedFeedForward,
    MergedLinear,
    MergedMlpBlock,
    WithNones,
    first_of,
    with_first,
)

_NO_MIXER = "nothing comes before its feed-forward branch"
_NO_SKIP = "no skip around what comes before its feed-forward branch"


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While inside, the modules compute what is given for them; past nn.Module, which would register it."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


def _mixed(lam: Lambda, original: Callable[[Tensor], Tensor], own: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return own(x) if fixed(lam, 0.0) else mix(lam, original(x), own(x))

    return forward


def _nothing(x: Tensor) -> Tensor:
    return x


class FeedForwardFfn(Candidate):
    """The branch as one linear layer, then its activation and a batch norm over the sum."""

    name = "ffn"
    layer_norms = True

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return None

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.where = feed_forward_of(block)
        layers = self.where.layers(block)
        read, hidden, given = layers.channels
        self.norm = layers.own_norm(layers.norm, read)
        self.norm_mid = layers.new_norm(hidden)
        self.norm_after = layers.own_norm(layers.norm_after, given)
        self.act = own_activation(layers.act)
        self.tail_norm = layers.new_norm(given)

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, norm_lam: Lambda | None = None, **others: Any
    ) -> Any:  # what the block returns
        with self._pruned_layers(block, lam, lam if norm_lam is None else norm_lam):
            output = block(x, **others)
        return with_first(output, self._tail(first_of(output), lam))

    def _pruned_layers(self, block: nn.Module, lam: Lambda, norm_lam: Lambda) -> Any:
        layers = self.where.layers(block)
        forwards = {layers.act: _mixed(lam, own_activation(layers.act), self.norm_mid)}
        for original, own in ((layers.norm, self.norm), (layers.norm_after, self.norm_after)):
            if original is not None:
                forwards[original] = _mixed(norm_lam, original.forward, own)
        return standing_in(forwards)

    def _tail(self, y: Tensor, lam: Lambda) -> Tensor:
        pruned = self.tail_norm(self.act(y))
        return pruned if fixed(lam, 0.0) else mix(lam, y, pruned)

    def merge(self, block: nn.Module) -> nn.Module:
        own = copy.deepcopy(block)
        linears = [step.path for step in self.where.steps if step.kind == "linear"]
        for step in self.where.steps:
            if step.kind in ("norm", "act") or step.path == linears[1]:
                own.set_submodule(step.path, nn.Identity())
        own.set_submodule(linears[0], self._layer(block, self._linear(block)))
        return MergedFeedForward(own, linears[0], copy.deepcopy(self.act), copy.deepcopy(self.tail_norm))

    def _linear(self, block: nn.Module) -> LinearConv:
        """The branch up to its scale."""
        layers = self.where.layers(block)
        read = LinearConv.from_conv if isinstance(layers.fc1, nn.Conv2d) else LinearConv.from_linear
        fc1, fc2 = read(layers.fc1), read(layers.fc2)
        if self.norm is not None:
            before = LinearConv.identity(fc1.in_channels, layers.fc1.weight)
            fc1 = compose(fc1, before.scaled(*norm_affine(self.norm)))
        whole = compose(fc2, fc1.scaled(*norm_affine(self.norm_mid)))
        return whole if self.norm_after is None else whole.scaled(*norm_affine(self.norm_after))

    def _layer(self, block: nn.Module, linear: LinearConv) -> nn.Module:
        """As what the branch is made of: a linear layer, or a 1x1 convolution."""
        fc1 = self.where.layers(block).fc1
        return linear.to_conv(fc1.weight) if isinstance(fc1, nn.Conv2d) else linear.to_linear(fc1.weight)


class _WithoutMixer:
    """What comes before the branch removed; x doubles as it fades, as in `vit.without_attention`."""

    @staticmethod
    def refusal(block: nn.Module) -> str | None:
        where = feed_forward_of(block)
        if not where.has_mixer:
            return _NO_MIXER
        return None if where.keeps_input and where.from_the_skip else _NO_SKIP

    @staticmethod
    def before_branch(
        where: FeedForward, block: nn.Module, x: Tensor, lam: Lambda, others: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """(2 (1 - lam) x + lam * what the branch would read, what the block returned for it)."""
        if fixed(lam, 0.0):
            return 2 * x, where.alone(x)
        layers = where.layers(block)
        forwards = dict.fromkeys((layers.fc1, layers.act), _nothing)
        forwards |= {norm: _nothing for norm in (layers.norm, layers.norm_after) if norm is not None}
        with standing_in(forwards | {layers.fc2: lambda z: z.new_zeros(()).expand_as(z)}):
            output = block(x, **others)
        return 2 * (1 - lam) * x + lam * first_of(output), output


class FeedForwardAttention(Candidate):
    """What comes before the branch removed, the branch left as it is: exact as it stands."""

    name = "attention"

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return _WithoutMixer.refusal(block)

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.where = feed_forward_of(block)

    def forward(self, block: nn.Module, x: Tensor, lam: Lambda, **others: Any) -> Any:
        x, output = _WithoutMixer.before_branch(self.where, block, x, lam, others)
        return with_first(output, x + self.where.branch(block)(x))

    def merge(self, block: nn.Module) -> nn.Module:
        branch = copy.deepcopy(self.where.branch(block))
        return as_returned(MergedMlpBlock(nn.Identity(), branch, nn.Identity()), self.where)


class FeedForwardLinear(FeedForwardFfn):
    """What comes before the branch removed and the branch merged with its skip: one linear layer, activation, norm."""

    name = "linear"

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return _WithoutMixer.refusal(block)

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, norm_lam: Lambda | None = None, **others: Any
    ) -> Any:
        x, output = _WithoutMixer.before_branch(self.where, block, x, lam, others)
        with self._pruned_layers(block, lam, lam if norm_lam is None else norm_lam):
            y = x + self.where.branch(block)(x)
        return with_first(output, self._tail(y, lam))

    def merge(self, block: nn.Module) -> nn.Module:
        linear, gamma = self._linear(block), self.where.gamma(block)
        if gamma is not None:
            linear = linear.scaled(gamma.detach().double().flatten())
        linear = add(linear, LinearConv.identity(linear.in_channels, linear.weight))
        layer = self._layer(block, replace(linear, weight=2 * linear.weight))
        kind = MergedConv if isinstance(layer, nn.Conv2d) else MergedLinear
        return as_returned(kind(layer, copy.deepcopy(self.act), copy.deepcopy(self.tail_norm)), self.where)


class FeedForwardDrop(Drop):
    """The whole block dropped."""

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return None if feed_forward_of(block).keeps_input else _NO_SKIP

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.where = feed_forward_of(block)

    def forward(self, block: nn.Module, x: Tensor, lam: Lambda, **others: Any) -> Any:
        if fixed(lam, 0.0):
            return self.where.alone(x)
        output = block(x, **others)
        return with_first(output, mix(lam, first_of(output), x))

    def merge(self, block: nn.Module) -> nn.Module:
        return as_returned(Dropped(), self.where)


def as_returned(merged: nn.Module, where: FeedForward) -> nn.Module:
    """A merged block that returns what the block would."""
    return merged if where.returned is None else WithNones(merged, where.returned)
