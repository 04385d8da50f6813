"""What planning makes of a model, as values: the modules that run, and one entry for each operation of theirs."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import nn

from depthfuse.acceleration.planning.nan import makes_nan
from depthfuse.acceleration.planning.part import PlannedPart
from depthfuse.acceleration.planning.program import Call, Form
from depthfuse.acceleration.planning.signature import Signature
from depthfuse.acceleration.planning.trees import Tree
from depthfuse.errors import AccelerationError
from depthfuse.fused.layers import FusedModule
from depthfuse.spec import ModelSource

Example = tuple[tuple[tuple[int, ...], torch.dtype], ...]  # shape and dtype of each input


@dataclass(frozen=True)
class Cost:
    """What one operation takes on one input.

    latency_ms: as it runs in the plan: in the native engine, where that runs the whole (0 where it has no need of the
    operation), else op by op. before_ms: of the layers that it stands for, as the model runs them, or None where the
    model was not given. macs: multiply-accumulates. bytes_moved: each tensor that it reads or writes counted once.
    roofline_ms: the least time that arithmetic or memory allow.
    """

    latency_ms: float
    before_ms: float | None
    macs: int
    bytes_moved: int
    roofline_ms: float

    @property
    def roofline_percent(self) -> float:
        """How much of the roofline's speed is reached; above 100 where data were in a cache, 0 where nothing runs."""
        return 100 * self.roofline_ms / self.latency_ms if self.latency_ms > 0.0 else 0.0


@dataclass(frozen=True)
class Entry:
    """One operation of the plan.

    path: module path in the original model. kind: class or function. implementation: what runs it where the plan runs
    op by op ("eager" if it runs as it was). epilogue: what is fused behind it. absorbed: paths of the layers that it
    also stands for.

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

    def of_node(self, node: str, nodes: tuple[str, ...]) -> Entry:
        """The same entry with its place in the graph."""
        return replace(self, node=node, nodes=nodes)

    def inside(self, prefix: str) -> Entry:
        """The same entry as part of a larger plan, whose graph lies at `prefix`."""
        return replace(
            self,
            path=f"{prefix}.{self.path}" if self.path else prefix,
            module=f"{prefix}.graph.{self.module}" if self.module else "",
            absorbed=tuple(f"{prefix}.{path}" for path in self.absorbed),
            part=prefix,
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """A model as fused modules, and what it was planned for. Planning makes it, all else reads it.

    module: what runs: one graph on flat tensors, or a copy of the model with planned parts in it. entries: its
    operations, in order. model: the class of what it was made from. dtype: of its weights, in the place of the model's
    main dtype. example, tree: the call that it was made and is tuned for. source: how timm builds the model, as far as
    that is known. signature: of the model.

    form, outputs: the calls that the graph is right for, and what holds its outputs; None where the plan is no graph,
    which takes any call that the model takes. writes_inputs: whether it may write over what it is given.
    """

    module: nn.Module
    entries: tuple[Entry, ...]
    model: str
    dtype: torch.dtype
    example: Example
    source: ModelSource | None
    signature: Signature
    tree: Tree
    form: Form | None
    outputs: Tree | None
    writes_inputs: bool

    @property
    def device(self) -> torch.device:
        weight = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
        if weight is None:
            raise AccelerationError(f"{self.model} uses none of its weights: there is nothing to accelerate")
        return weight.device

    @functools.cached_property
    def makes_nan(self) -> bool:
        """Whether it may make NaN of numbers that are finite."""
        return makes_nan(self.module)

    @property
    def is_dynamic(self) -> bool:
        """Whether it takes other sizes than the example's."""
        parts = (module.form for module in self.module.modules() if isinstance(module, PlannedPart))
        forms = [self.form, *parts]
        return any(isinstance(n, str) for form in forms if form for shape in form.sizes.shapes for n in shape)

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

    def cast(self, call: Call) -> Call:
        """A call with floating-point tensors in the dtypes that the plan was made for."""
        if call.tree != self.tree:
            return call
        tensors = tuple(
            x.to(dtype) if x.is_floating_point() and dtype.is_floating_point else x
            for x, (_, dtype) in zip(call.tensors, self.example, strict=True)
        )
        return replace(call, tensors=tensors)

    def example_call(self) -> Call:
        """Noise of the shapes that the plan was made for; zeros for what is no floating-point number."""
        generator = torch.Generator().manual_seed(0)
        tensors = tuple(
            (
                torch.randn(shape, generator=generator).to(self.device, dtype)
                if dtype.is_floating_point
                else torch.zeros(shape, dtype=dtype, device=self.device)
            )
            for shape, dtype in self.example
        )
        return Call(tensors, self.tree)
