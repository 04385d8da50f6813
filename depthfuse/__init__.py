"""depthfuse: make vision networks shallower, and run what is left fast.

Names are imported when they are first used: torch and timm take seconds, and `depthfuse --help` needs neither.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from depthfuse import _spinning, _torchvision
from depthfuse._version import __version__ as __version__

if TYPE_CHECKING:
    from depthfuse.acceleration import accelerate, load_accelerated
    from depthfuse.config import PruneConfig
    from depthfuse.data import DataConfig, open_data
    from depthfuse.exporting import export
    from depthfuse.merging.merge import merge
    from depthfuse.merging.supernet import Supernet, recalibrate
    from depthfuse.origins import allow_origin
    from depthfuse.runs.run import prune
    from depthfuse.runs.weights import load
    from depthfuse.searching.search import search
    from depthfuse.spec import BlockChoice, ModelSource, SubnetSpec
    from depthfuse.training.schedule import Schedule

_spinning.shorten()
_torchvision.ensure_before_timm()

__all__ = [
    "BlockChoice",
    "DataConfig",
    "ModelSource",
    "PruneConfig",
    "Schedule",
    "SubnetSpec",
    "Supernet",
    "accelerate",
    "allow_origin",
    "export",
    "load",
    "load_accelerated",
    "merge",
    "open_data",
    "prune",
    "recalibrate",
    "search",
]

# The same as above, for when the program runs.
_WHERE = {
    "BlockChoice": "spec",
    "DataConfig": "data",
    "ModelSource": "spec",
    "PruneConfig": "config",
    "Schedule": "training.schedule",
    "SubnetSpec": "spec",
    "Supernet": "merging.supernet",
    "accelerate": "acceleration",
    "allow_origin": "origins",
    "export": "exporting",
    "load": "runs.weights",
    "load_accelerated": "acceleration",
    "merge": "merging.merge",
    "open_data": "data",
    "prune": "runs.run",
    "recalibrate": "merging.supernet",
    "search": "searching.search",
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, or a part of the package, such as `depthfuse.ops`."""
    if name in _WHERE:
        value = getattr(importlib.import_module(f"depthfuse.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"depthfuse.{name}") is not None:
        return importlib.import_module(f"depthfuse.{name}")
    raise AttributeError(f"module 'depthfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
