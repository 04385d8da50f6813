"""The registry of merge candidates: for each block type, the ways in which such a block can be pruned.

A candidate is one class: its switch in the supernet and its path over lambda (`forward`), and its merge (`merge`). It
holds the parameters that only the pruned block has (separate norms); the shared convolutions and linears stay in the
original block, which is passed in.

lambda is a number or, for a learned gate, a 0-dim float tensor.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthfuse.merging.merged_blocks import TokenBatchNorm

Lambda = float | Tensor


class Candidate(nn.Module):
    """One way to prune one block."""

    name: ClassVar[str]
    alone: ClassVar[bool] = True  # may be the default; otherwise offered last, and only beside another one
    layer_norms: ClassVar[bool] = False  # `forward` takes `norm_lam`, the lambda of LayerNorm -> BatchNorm

    def __init__(self, block: nn.Module):
        super().__init__()

    @classmethod
    @abstractmethod
    def refusal(cls, block: nn.Module) -> str | None:
        """Why this block cannot be pruned in this way, or None where it can."""

    @abstractmethod
    def forward(self, block: nn.Module, x: Tensor, lam: Lambda) -> Tensor:
        """The block at 0 <= lam <= 1: lam = 0 is the pruned block; towards 1 it becomes the original one."""

    def share_norms(self, block: nn.Module) -> None:
        """For an ablation: use the weights and biases of the block's own norms, where it has norms alike."""

    def drop_border_remedy(self) -> None:
        """For an ablation: pad with zeros between convolutions, which a merge cannot follow at the border."""

    @property
    def form(self) -> str:
        """Equal for candidates of a block that training does not tell apart: of such subnets one is trained."""
        return self.name

    @abstractmethod
    def merge(self, block: nn.Module) -> nn.Module:
        """The merged module, equal to `forward(block, x, 0)` in eval mode. Computed in float64, cast once."""


_CANDIDATES: dict[type[nn.Module] | str, list[type[Candidate]]] = {}


def register(*block_types: type[nn.Module] | str) -> Callable[[type[Candidate]], type[Candidate]]:
    """Class decorator: offer a candidate for these block types. The first one registered is the default.

    A type of a library that may not be installed is named: "package.module.Class".
    """

    def add(candidate: type[Candidate]) -> type[Candidate]:
        for block_type in block_types:
            _CANDIDATES.setdefault(block_type, []).append(candidate)
        return candidate

    return add


def known_candidates(block_type: type[nn.Module]) -> tuple[type[Candidate], ...]:
    """What is registered for a block type, those that may be the default first."""
    name = f"{block_type.__module__}.{block_type.__qualname__}"
    known = _CANDIDATES.get(block_type) or _CANDIDATES.get(name, ())
    return tuple(sorted(known, key=lambda c: not c.alone))


def fixed(lam: Lambda, value: float) -> bool:
    """Whether lam is the number `value`, so that one side of a mix need not be computed.

    A tensor never is: a learned gate needs its gradient at 0 and 1 too.
    """
    return not isinstance(lam, Tensor) and lam == value


def mix(lam: Lambda, original: Tensor, pruned: Tensor) -> Tensor:
    """lam * original + (1 - lam) * pruned; exactly the one or the other at 1 and 0."""
    dtype = torch.promote_types(original.dtype, pruned.dtype)  # autocast leaves some layers in float32
    original, pruned = original.to(dtype), pruned.to(dtype)
    return pruned.lerp(original, lam.to(pruned) if isinstance(lam, Tensor) else lam)


def shrink(lam: Lambda, weight: Tensor, tap: Tensor) -> Tensor:
    """A kernel [O, I, k, k] (k odd) on its way to the 1x1 `tap` [O, I, 1, 1] at its centre."""
    return mix(lam, weight, F.pad(tap, (weight.shape[-1] // 2,) * 4))


def centre_tap(conv: nn.Conv2d) -> Tensor:
    """[O, I / groups, 1, 1]"""
    centre = conv.kernel_size[0] // 2
    return conv.weight[:, :, centre : centre + 1, centre : centre + 1]


def centre_tap_refusal(conv: nn.Conv2d) -> str | None:
    """Why the centre tap alone would not read the pixels that lie under the convolution's outputs, or None."""
    for size, padding, dilation in zip(conv.kernel_size, conv.padding, conv.dilation, strict=True):
        if size % 2 == 0 or padding != dilation * (size // 2):
            return f"a {size}x{size} kernel with padding {padding} does not lie centred on its output"
    return None


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
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if getattr(own, name) is not None:
                getattr(own, name).copy_(getattr(norm, name))
    return own


def new_batch_norm(channels: int, like: Tensor) -> nn.BatchNorm2d:
    """The batch norm that a pruned CNN block gets after its new non-linearity."""
    return nn.BatchNorm2d(channels, device=like.device, dtype=like.dtype)


def new_token_norm(channels: int, like: Tensor) -> TokenBatchNorm:
    return TokenBatchNorm(channels, device=like.device, dtype=like.dtype)
