"""depthfuse: make vision networks shallower, and run what is left fast."""

from depthfuse import _torchvision

_torchvision.ensure()

# timm must not be imported before the line above
from depthfuse.acceleration import accelerate, load_accelerated  # noqa: E402
from depthfuse.config import PruneConfig  # noqa: E402
from depthfuse.data import DataConfig, open_data  # noqa: E402
from depthfuse.merging.merge import merge  # noqa: E402
from depthfuse.merging.supernet import Supernet, recalibrate  # noqa: E402
from depthfuse.runs.run import load, prune  # noqa: E402
from depthfuse.searching.search import search  # noqa: E402
from depthfuse.spec import BlockChoice, ModelSource, SubnetSpec  # noqa: E402

__all__ = [
    "BlockChoice",
    "DataConfig",
    "ModelSource",
    "PruneConfig",
    "SubnetSpec",
    "Supernet",
    "accelerate",
    "load",
    "load_accelerated",
    "merge",
    "open_data",
    "prune",
    "recalibrate",
    "search",
]
__version__ = "0.1.0"
