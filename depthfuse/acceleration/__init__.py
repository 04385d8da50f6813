"""Replace a model's layers by fused, autograd-free modules: `accelerate` and what it gives."""

from depthfuse.acceleration.api import accelerate, load_accelerated
from depthfuse.acceleration.checking.report import Report
from depthfuse.acceleration.model import AcceleratedModel
from depthfuse.acceleration.planning.plan import Cost, Entry
from depthfuse.errors import AccelerationError
from depthfuse.measured_cache import cache_folder

__all__ = [
    "AcceleratedModel",
    "AccelerationError",
    "Cost",
    "Entry",
    "Report",
    "accelerate",
    "cache_folder",
    "load_accelerated",
]
