"""A module of a model that cannot be captured as a whole, as planned: called as it was, with its plan inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from depthfuse.acceleration.planning.program import Call, Form
from depthfuse.acceleration.planning.signature import Signature
from depthfuse.acceleration.planning.trees import Tree, unflatten
from depthfuse.errors import AccelerationError


class PlannedPart(nn.Module):
    """Runs the plan for calls that it was made for, and the module itself for others.

    graph: the plan. form, outputs: of the calls that it takes, and of what it gives. signature: of the module.
    original: the module, or None where it is not at hand, as in a plan that was loaded.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        form: Form,
        outputs: Tree,
        signature: Signature,
        original: nn.Module | None,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.form, self.outputs, self.signature = form, outputs, signature
        # No submodule: its tensors are no part of the plan.
        self.__dict__["original"] = original
        self.eval()

    def __getattr__(self, name: str) -> Any:
        # The module around this one may read its child's attributes.
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            if original is None or name.startswith("__"):
                raise
            return getattr(original, name)

    def _apply(self, fn, recurse: bool = True):
        if self.original is not None:
            self.original._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module. Raises AccelerationError for a call that only the module takes, where it is not at hand."""
        call = self._planned(args, kwargs)
        if call is not None:
            return unflatten(as_tuple(self.graph(*call.tensors)), self.outputs)
        if self.original is None:
            raise AccelerationError(
                f"a part of this model was planned for {self.form}, and is called otherwise: accelerate the model "
                "with such an example"
            )
        return self.original(*args, **kwargs)

    def _planned(self, args: tuple, kwargs: dict[str, Any]) -> Call | None:
        try:
            call = Call.of(*self.signature.bind(args, kwargs))
        except (AccelerationError, TypeError):
            return None
        if not call.tensors or torch.is_autocast_enabled(call.tensors[0].device.type):
            return None
        return call if self.form.takes(call) else None


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    """The flat outputs of a plan's graph, which gives one as it is."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
