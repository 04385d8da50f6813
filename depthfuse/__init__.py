"""depthfuse: make vision networks shallower, and run what is left fast."""

from depthfuse import _torchvision

_torchvision.ensure()

from depthfuse.merge import merge  # noqa: E402  timm must not be imported before the line above
from depthfuse.spec import BlockChoice, ModelSource, SubnetSpec  # noqa: E402
from depthfuse.supernet import Supernet, recalibrate  # noqa: E402

__all__ = ["BlockChoice", "ModelSource", "SubnetSpec", "Supernet", "merge", "recalibrate"]
__version__ = "0.1.0"
