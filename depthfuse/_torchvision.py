"""Make `import torchvision` work beside a torch that its compiled operators do not match.

timm imports torchvision for its transforms and data sets. A torchvision wheel built for another torch
(typically for CUDA, beside a CPU-only torch) cannot load its compiled operators, and its import then dies
with `RuntimeError: operator torchvision::nms does not exist`, because it attaches shape rules to operators
that nobody defined. `ensure` declares those operators, without an implementation, and only where the plain
import fails that way. All of torchvision that is written in Python then works. Detection operators still
say that they are missing.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# The operators to which torchvision's Python code attaches shape rules at import (qnms since 0.28).
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# Declarations live as long as this object does.
_library: torch.library.Library | None = None


def ensure() -> None:
    """Import torchvision, declaring its missing operators where that is what makes the import fail.

    Does nothing if torchvision is not installed: timm then raises its own ImportError.

    Raises:
        RuntimeError: torchvision's own, if its import fails for any other reason.
    """
    global _library
    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _library is not None:
            raise
        logger.debug("torchvision's compiled operators do not load (%s): declaring them", error)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    import torch

    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    importlib.import_module("torchvision")


def ensure_before_timm() -> None:
    """Have `ensure` called when timm is first imported, by whomever: torchvision itself takes seconds."""
    sys.meta_path.insert(0, _BeforeTimm())


class _BeforeTimm:
    """Finds no module, but is asked before those that do."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "timm":
            ensure()
