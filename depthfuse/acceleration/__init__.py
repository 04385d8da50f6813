"""Replace a model's layers by fused, autograd-free modules: `accelerate` and what it gives."""

from depthfuse.acceleration.api import accelerate
from depthfuse.acceleration.checking.report import Cost, Entry, Report
from depthfuse.acceleration.running.model import AcceleratedModel
from depthfuse.acceleration.saving.saved import load_accelerated
from depthfuse.errors import AccelerationError
from depthfuse.measuring.measured_cache import cache_folder

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
