"""Where the feed-forward branch at the end of a block lies: by the paths of its layers. `feed_forward_reading.py` finds
it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from depthfuse.merging.adapters.base import batch_norm_like, new_batch_norm, new_token_norm
from depthfuse.merging.merged_blocks import ChannelScale


@dataclass(frozen=True)
class Step:
    """One layer of the branch. kind: "norm", "linear", "act", "dropout", "drop path" or "scale" (a parameter)."""

    kind: str
    path: str


@dataclass(frozen=True)
class FeedForward:
    """Where the branch lies in its block."""

    steps: tuple[Step, ...]
    from_the_skip: bool  # whether the branch reads what it is added to
    keeps_input: bool  # whether that is the block's input, or a sum with it
    has_mixer: bool  # whether anything comes before the branch
    returned: (
        int | None
    )  # how many values the block returns in a tuple, the first one its output; None: no tuple

    def layers(self, block: nn.Module) -> BranchLayers:
        """The layers of `block` itself."""
        first, second = (i for i, step in enumerate(self.steps) if step.kind == "linear")
        norms = {i > second: step.path for i, step in enumerate(self.steps) if step.kind == "norm"}
        act = next(step.path for step in self.steps if step.kind == "act")

        def layer(path: str | None) -> Any:
            return None if path is None else block.get_submodule(path)

        return BranchLayers(
            layer(norms.get(False)),
            layer(self.steps[first].path),
            layer(act),
            layer(self.steps[second].path),
            layer(norms.get(True)),
        )

    def branch(self, block: nn.Module) -> nn.Sequential:
        """The branch, without its skip, as a module of the block's own layers."""
        return nn.Sequential(*(self._layer(block, step) for step in self.steps))

    def _layer(self, block: nn.Module, step: Step) -> nn.Module:
        if step.kind != "scale":
            return block.get_submodule(step.path)
        convolution = isinstance(self.layers(block).fc1, nn.Conv2d)
        return ChannelScale(self.gamma(block), (-1, 1, 1) if convolution else (-1,))

    def gamma(self, block: nn.Module) -> Tensor | None:
        """The parameter of the branch's scale, of C values."""
        path = next((step.path for step in self.steps if step.kind == "scale"), None)
        if path is None:
            return None
        holder, _, name = path.rpartition(".")
        return getattr(block.get_submodule(holder), name)

    def alone(self, x: Tensor) -> Tensor | tuple[Any, ...]:
        """x as the block would return it."""
        return x if self.returned is None else (x, *[None] * (self.returned - 1))


@dataclass(frozen=True)
class BranchLayers:
    """The layers of a branch that pruning changes; references to the block's own modules."""

    norm: nn.Module | None
    fc1: nn.Module  # linear layers over the last axis, or 1x1 convolutions
    act: nn.Module
    fc2: nn.Module
    norm_after: nn.Module | None

    @property
    def channels(self) -> tuple[int, int, int]:
        """(read, hidden, given)."""
        if isinstance(self.fc1, nn.Conv2d):
            return self.fc1.in_channels, self.fc1.out_channels, self.fc2.out_channels
        return self.fc1.in_features, self.fc1.out_features, self.fc2.out_features

    def new_norm(self, channels: int) -> nn.Module:
        """A batch norm for these layers' memory layout."""
        make = new_batch_norm if isinstance(self.fc1, nn.Conv2d) else new_token_norm
        return make(channels, self.fc1.weight)

    def own_norm(self, norm: nn.Module | None, channels: int) -> nn.Module | None:
        """The batch norm in the place of one of the branch's norms."""
        if norm is None:
            return None
        return batch_norm_like(norm) if isinstance(norm, nn.BatchNorm2d) else self.new_norm(channels)
