"""The registry of merge candidates: for each block type, the ways in which such a block can be pruned.

A candidate is one class: its switch in the supernet and its path over lambda (`forward`), and its merge (`merge`). It
holds the parameters that only the pruned block has (separate norms); the shared convolutions and linears stay in the
original block, which is passed in.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from depthfuse.blocks import TokenBatchNorm


class Candidate(nn.Module):
    """One way to prune one block."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def refusal(cls, block: nn.Module) -> str | None:
        """Why this block cannot be pruned in this way, or None where it can."""

    @abstractmethod
    def forward(self, block: nn.Module, x: Tensor, lam: float) -> Tensor:
        """The block at 0 <= lam < 1: lam = 0 is the pruned block; towards 1 it becomes the original one."""

    @abstractmethod
    def merge(self, block: nn.Module) -> nn.Module:
        """The merged module, equal to `forward(block, x, 0)` in eval mode. Computed in float64, cast once."""


_CANDIDATES: dict[type[nn.Module], list[type[Candidate]]] = {}


def register(*block_types: type[nn.Module]) -> Callable[[type[Candidate]], type[Candidate]]:
    """Class decorator: offer a candidate for these block types. The first one registered is the default."""

    def add(candidate: type[Candidate]) -> type[Candidate]:
        for block_type in block_types:
            _CANDIDATES.setdefault(block_type, []).append(candidate)
        return candidate

    return add


@dataclass(frozen=True)
class BlockInfo:
    """What depthfuse knows of one block of a model."""

    path: str
    block_type: str
    candidates: tuple[type[Candidate], ...]  # empty: not prunable
    reason: str  # why not prunable, or why some candidates are missing


def find_blocks(model: nn.Module) -> list[BlockInfo]:
    """All blocks of a model in order, by type, prunable or not, each with the reason.

    A block of unknown type is one of a numbered row (element of an `nn.Sequential` or `nn.ModuleList`, or "b1", "b2",
    ...) whose class is defined by timm's models and that holds no smaller such block. A model without any
    gives an empty list.
    """
    found: list[BlockInfo] = []

    def visit(module: nn.Module, path: str, numbered: bool) -> bool:
        known = _CANDIDATES.get(type(module))
        if known is not None:
            refusals = {c.name: c.refusal(module) for c in known}
            usable = tuple(c for c in known if refusals[c.name] is None)
            reasons = [f"{name}: {why}" if usable else why for name, why in refusals.items() if why]
            found.append(BlockInfo(path, type(module).__name__, usable, "; ".join(dict.fromkeys(reasons))))
            return True
        container = isinstance(module, nn.Sequential | nn.ModuleList)
        children = module.named_children()
        inner = [visit(m, f"{path}.{n}" if path else n, container or n[-1:].isdigit()) for n, m in children]
        if any(inner):
            return True
        if numbered and type(module).__module__.startswith("timm.models."):
            found.append(BlockInfo(path, type(module).__name__, (), "unknown block type"))
            return True
        return False

    visit(model, "", False)
    return found


def mix(lam: float, original: Tensor, pruned: Tensor) -> Tensor:
    """lam * original + (1 - lam) * pruned."""
    return pruned.lerp(original, lam)


def own_activation(act: nn.Module) -> nn.Module:
    """A copy that leaves its input alone: a mixed block still needs the value before the activation."""
    act = copy.deepcopy(act)
    if hasattr(act, "inplace"):
        act.inplace = False
    return act


def batch_norm_like(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A plain batch norm with the state of `norm`, for the second position of a switch."""
    own = nn.BatchNorm2d(
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        device=norm.running_mean.device,
        dtype=norm.running_mean.dtype,
    )
    own.load_state_dict({key: value for key, value in norm.state_dict().items() if key in own.state_dict()})
    return own


def new_batch_norm(channels: int, like: Tensor) -> nn.BatchNorm2d:
    """The batch norm that a pruned CNN block gets after its new non-linearity."""
    return nn.BatchNorm2d(channels, device=like.device, dtype=like.dtype)


def new_token_norm(channels: int, like: Tensor) -> TokenBatchNorm:
    return TokenBatchNorm(channels, device=like.device, dtype=like.dtype)
