"""Images for training, search and measurement: an embedded set, folders, and timm's named data sets."""

from depthfuse.data.bundle import Batches, DataBundle, SeededMixup
from depthfuse.data.config import DataConfig
from depthfuse.data.opening import has_no_classes, open_data
from depthfuse.data.tensors import bundle_of_tensors
from depthfuse.errors import DataError

__all__ = [
    "Batches",
    "DataBundle",
    "DataConfig",
    "DataError",
    "SeededMixup",
    "bundle_of_tensors",
    "has_no_classes",
    "open_data",
]
