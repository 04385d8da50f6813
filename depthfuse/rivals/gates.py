"""Learned choices of blocks: what two rival methods train in place of a supernet.

Each block has one number, its gate: 1 keeps the original, 0 is the pruned block, and the switch mixes in between. After
training, blocks are pruned in the order of their gates until the budget is met.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from depthfuse.errors import BudgetError
from depthfuse.merging.supernet import Supernet
from depthfuse.searching.space import Choices, SearchSpace
from depthfuse.training.objectives import CalibrateNet, Objective, ScoreNet


class GatedNet(nn.Module):
    """A supernet whose switches are set by gates.

    Args:
        candidates: {block path: the candidate that its gate leads to}.
        gate: where the gates start.
    """

    def __init__(self, supernet: Supernet, candidates: Mapping[str, str], gate: float = 1.0):
        super().__init__()
        self.supernet = supernet
        self.candidates = dict(candidates)
        self.gates = nn.Parameter(torch.full((len(candidates),), gate))

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:  # [N, C, H, W] -> [N, classes]
        """gates: [blocks], in place of the parameter itself."""
        self.supernet.set_choices(self.candidates)
        values = (self.gates if gates is None else gates).unbind()
        for path, value in zip(self.candidates, values, strict=True):
            self.supernet.blocks[path].lam = value
        return self.supernet(x)

    def pruned(self, space: SearchSpace) -> Choices:
        """The subnet that prunes the blocks with the lowest gates, as many as the budget asks for."""
        order = self.gates.detach().argsort(stable=True).tolist()
        paths = list(self.candidates)
        choices = {path: names[0] for path, names in space.forced.items()}
        (level,) = space.levels(1)
        for index in order:
            if space.meets(choices, level):
                break
            choices.setdefault(paths[index], self.candidates[paths[index]])
        if not space.meets(choices, level):
            raise BudgetError(
                f"gates lead to one candidate a block, and with all blocks pruned ({choices}) the budget is not met"
            )
        return space.ordered(choices)


class GateObjective(Objective):
    """Base: labels alone teach the net and its gates."""

    net: GatedNet

    def evaluate(
        self, net: nn.Module, progress: float, score: ScoreNet, calibrate: CalibrateNet
    ) -> dict[str, float]:
        """Nothing may be chosen as the best: the gates of the last step decide."""
        return {}


class TopGatesObjective(GateObjective):
    """DepthShrinker (Fu et al., ICML 2022): gates are 0 or 1, the highest stay at 1, gradients pass straight through.

    How many are 0 follows from the budget at every step.
    """

    def __init__(self, net: GatedNet, space: SearchSpace, label_smoothing: float = 0.0):
        super().__init__(net, label_smoothing)
        self.space = space

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        pruned = self.net.pruned(self.space)
        hard = self.net.gates.new_tensor([float(path not in pruned) for path in self.net.candidates])
        gates = hard + self.net.gates - self.net.gates.detach()
        return self.label_loss(self.net(images, gates), targets)


class FoldingObjective(GateObjective):
    """Layer-Folding (Ben Dror et al., 2021): activations are act(z) * (1 - alpha) + z * alpha, and a penalty on
    |1 - alpha^2| draws every alpha to 1; those that get there cost the net least. Here 1 - alpha is the gate of a
    block, for all its activations and norms, so that what is folded can be merged.
    """

    def __init__(self, net: GatedNet, penalty: float = 0.3, label_smoothing: float = 0.0):
        super().__init__(net, label_smoothing)
        self.penalty = penalty

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Tensor:
        with torch.no_grad():
            self.net.gates.clamp_(0.0, 1.0)
        alpha = 1.0 - self.net.gates
        return self.label_loss(self.net(images), targets) + self.penalty * (1.0 - alpha**2).abs().mean()
