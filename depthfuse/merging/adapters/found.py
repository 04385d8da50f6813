"""The candidates of blocks that are found by structure: those of the families, on what was read."""

from __future__ import annotations

from torch import nn

from depthfuse.merging.adapters.base import Candidate
from depthfuse.merging.adapters.chain import Chain, Compact, ConvChain, LastCompact, LastIdentity
from depthfuse.merging.adapters.convnext import (
    ConvNeXtCompact,
    ConvNeXtDense,
    ConvNeXtFactorised,
    ConvNeXtParts,
)
from depthfuse.merging.adapters.drop import Drop
from depthfuse.merging.adapters.reading import structure_of
from depthfuse.merging.adapters.structure import ConvNeXtStructure, Structure


def read_chain(block: nn.Module) -> Chain:
    structure = structure_of(block)
    assert isinstance(structure, Structure)
    return structure.chain(block)


def read_convnext(block: nn.Module) -> ConvNeXtParts:
    structure = structure_of(block)
    assert isinstance(structure, ConvNeXtStructure)
    return structure.parts(block)


class Found(ConvChain):
    """A chain that was found by structure."""

    read = staticmethod(read_chain)

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        return cls.chain_refusal(cls.read(block))


class FoundDense(Found):
    """The whole block as one convolution."""


class FoundCompact(Compact, Found):
    """The whole block as one 1x1 convolution."""


class FoundLastCompact(LastCompact, Found):
    """Two convolutions as one of the size of the first."""


class FoundLastIdentity(LastIdentity, Found):
    """Two convolutions as the first."""


class FoundConvNeXt:
    """What all candidates of such a block share."""

    read = staticmethod(read_convnext)

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        parts = read_convnext(block)
        if parts.depthwise.stride != (1, 1) or parts.depthwise.in_channels != parts.fc2.out_features:
            return "the block changes shape between input and skip"
        return cls.parts_refusal(parts)


class FoundFactorised(FoundConvNeXt, ConvNeXtFactorised):
    """Depthwise then one 1x1 convolution, the skip beside them."""


class FoundConvNeXtDense(FoundConvNeXt, ConvNeXtDense):
    """One dense convolution with the skip inside."""


class FoundConvNeXtCompact(FoundConvNeXt, ConvNeXtCompact):
    """One 1x1 convolution with the skip inside."""


class FoundDrop(Drop):
    """A block with an identity for a skip, dropped whole."""

    @classmethod
    def refusal(cls, block: nn.Module) -> str | None:
        if isinstance(structure_of(block), ConvNeXtStructure):
            return None
        same = type(read_chain(block).shortcut) is nn.Identity
        return None if same else "no identity skip: input and output may differ in shape"


def candidates_of(block: nn.Module) -> tuple[type[Candidate], ...]:
    """What suits a block by its structure, the default first. Raises Unread."""
    if isinstance(structure_of(block, anew=True), ConvNeXtStructure):
        return FoundFactorised, FoundConvNeXtDense, FoundConvNeXtCompact, FoundDrop
    chain = read_chain(block)
    wide = [stage.conv.kernel_size != (1, 1) for stage in chain.stages]
    if wide == [True, True]:
        return FoundLastCompact, FoundDense, FoundLastIdentity, FoundDrop
    return (FoundDense, FoundCompact, FoundDrop) if any(wide) else (FoundDense, FoundDrop)
