"""What planning makes of a model, as values: the modules that run, and one entry for each operation of theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from depthfuse.fused.layers import FusedModule
from depthfuse.spec import ModelSource

Example = tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shape and dtype of each input


@dataclass(frozen=True)
class Cost:
    """What one operation takes on one input.

    latency_ms: as it runs in the plan, op by op. before_ms: of the layers that it stands for, as the model runs them,
    or None where the model was not given. macs: multiply-accumulates. bytes_moved: each tensor that it reads or writes
    counted once. roofline_ms: the least time that arithmetic or memory allow.
    """

    latency_ms: float
    before_ms: float | None
    macs: int
    bytes_moved: int
    roofline_ms: float

    @property
    def roofline_percent(self) -> float:
        """How much of the roofline's speed is reached; above 100 where the data were in a cache."""
        return 100 * self.roofline_ms / self.latency_ms


@dataclass(frozen=True)
class Entry:
    """One operation of the plan.

    path: module path in the original model. kind: class or function. implementation: what runs it ("eager" if it runs
    as it was). epilogue: what is fused behind it. absorbed: paths of the layers that it also stands for.

    module: path of its module in the plan, "" for a function. part: path of the graph in the plan that it belongs to,
    "" for the plan itself. node: its name in that graph. nodes: the names in the traced model of all that it stands
    for, of which it has the last one's value.

    cost: see `AcceleratedModel.profile`. error: of its output against the model in float64, relative to the largest
    value, with everything before it accelerated too; see `accelerate(verify="blocks")`.
    """

    path: str
    kind: str
    implementation: str
    epilogue: str
    absorbed: tuple[str, ...]
    fused: bool
    module: str = ""
    part: str = ""
    node: str = ""
    nodes: tuple[str, ...] = ()
    cost: Cost | None = None
    error: float | None = None

    def inside(self, prefix: str, is_layer: bool = False) -> Entry:
        """The same entry as part of a larger plan.

        Args:
            prefix: where its graph lies. is_layer: the graph stands for one layer, whose path is `prefix` itself.
        """
        return replace(
            self,
            path=prefix if is_layer else f"{prefix}.{self.path}",
            module=f"{prefix}.{self.module}" if self.module else "",
            absorbed=tuple(f"{prefix}.{path}" for path in self.absorbed),
            part=f"{prefix}.{self.part}" if self.part else prefix,
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """A model as fused modules, and what it was planned for. Planning makes it, all else reads it.

    module: what runs. entries: its operations, in order. model: the class of what it was made from. dtype: of its
    weights, and of what it is given. example: the inputs that it was made and is tuned for. in_channels: that images
    must have, where it takes one image tensor. source: how timm builds the model, as far as that is known.
    """

    module: nn.Module
    entries: tuple[Entry, ...]
    model: str
    dtype: torch.dtype
    example: Example
    in_channels: int | None
    source: ModelSource | None

    @property
    def device(self) -> torch.device:
        return next(t.device for t in [*self.module.parameters(), *self.module.buffers()])

    def fused_modules(self) -> dict[str, FusedModule]:
        """{path in `module`: fused module}."""
        return {name: m for name, m in self.module.named_modules() if isinstance(m, FusedModule)}

    def named_entries(self) -> tuple[Entry, ...]:
        """The entries, with what is bound to each fused module now."""
        modules = self.fused_modules()
        return tuple(
            replace(entry, implementation=modules[entry.module].implementation()) if entry.fused else entry
            for entry in self.entries
        )

    def cast(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs in the plan's dtype."""
        return tuple(x.to(self.dtype) for x in inputs)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Noise of the shapes that the plan was made for, in its dtype."""
        generator = torch.Generator().manual_seed(0)
        noise = (torch.randn(shape, generator=generator) for shape, _ in self.example)
        return self.cast(tuple(x.to(self.device) for x in noise))
