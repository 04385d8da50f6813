"""A candidate whose merged block has weights of its own, which are fitted, in the place of weights that it shares with
the original block."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from depthfuse.errors import SpecError
from depthfuse.fitting.blocks import can_be_fitted
from depthfuse.merging.adapters.base import Candidate, Lambda, fixed, mix
from depthfuse.merging.computed_weights import compute_weights, has_computed, private_copy
from depthfuse.merging.merged_blocks import first_of, with_first
from depthfuse.merging.supernet import Supernet


class Fitted(Candidate):
    """lam * block(x) + (1 - lam) * merged(x): what is trained is what is merged, so merging changes nothing.

    Its merged block is larger than the product of the original's layers, which other candidates train: a dense 3x3
    convolution has more weights than the 1x1, depthwise and 1x1 that it replaces.
    """

    def __init__(self, candidate: Candidate, block: nn.Module):
        super().__init__(block)
        self.name = candidate.name
        self.merged = candidate.merge(block)

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return None  # the candidate that it takes the place of was not refused

    @property
    def form(self) -> str:
        """Its layers: candidates that have the same start from other weights only, and learn the same."""
        if not can_be_fitted(self.merged):
            return self.name
        return f"{self.merged} {[tuple(value.shape) for value in self.merged.state_dict().values()]}"

    def forward(
        self, block: nn.Module, x: Tensor, lam: Lambda, **others: Any
    ) -> Any:  # what the block returns
        pruned = self.merged(x, **others)
        if fixed(lam, 0.0):
            return pruned
        original = block(x, **others)
        return with_first(original, mix(lam, first_of(original), first_of(pruned)))

    def merge(self, block: nn.Module) -> nn.Module:
        return copy.deepcopy(self.merged)


def with_fitted(supernet: Supernet) -> Supernet:
    """Give every candidate of a supernet, in place, a merged block of its own; returns it.

    Raises SpecError for a supernet whose candidates have them.
    """
    modes = {module: module.training for module in supernet.modules()}
    supernet.eval()  # blocks are merged in evaluation mode
    for path, switch in supernet.blocks.items():
        block = switch.block
        if has_computed(block):
            block = private_copy(block)
            compute_weights(block)
        for name, candidate in switch.candidates.items():
            if isinstance(candidate, Fitted):
                raise SpecError(f"the candidates of {path} are fitted already")
            switch.candidates[name] = Fitted(candidate, block)
    for module in supernet.modules():
        module.training = modes.get(module, False)
    return supernet
