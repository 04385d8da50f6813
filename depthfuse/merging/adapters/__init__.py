"""Which blocks of a timm model can be pruned, and how. Importing this package registers all families."""

from depthfuse.merging.adapters import convnext, drop, mobilenet, resnet, vit
from depthfuse.merging.adapters.base import BlockInfo, Candidate, find_blocks, register

__all__ = [
    "BlockInfo",
    "Candidate",
    "convnext",
    "drop",
    "find_blocks",
    "mobilenet",
    "register",
    "resnet",
    "vit",
]
