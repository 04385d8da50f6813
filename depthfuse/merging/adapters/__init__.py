"""Which blocks of a model can be pruned, and how. Importing this package registers all families."""

from depthfuse.merging.adapters import convnext, drop, idle, mobilenet, resnet, vit
from depthfuse.merging.adapters.base import Candidate, register
from depthfuse.merging.adapters.finding import BlockInfo, find_blocks

__all__ = [
    "BlockInfo",
    "Candidate",
    "convnext",
    "drop",
    "find_blocks",
    "idle",
    "mobilenet",
    "register",
    "resnet",
    "vit",
]
