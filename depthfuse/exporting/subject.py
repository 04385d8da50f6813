"""What is exported: a model as one graph, with everything folded that can be, and the example it is exported for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.api import default_input, load_accelerated
from depthfuse.acceleration.model import AcceleratedModel
from depthfuse.acceleration.planning.build import build_whole_plan
from depthfuse.acceleration.planning.own import main_dtype, own_copy
from depthfuse.acceleration.planning.part import as_tuple
from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.planning.signature import signature_of
from depthfuse.acceleration.planning.trees import Constant, Container, Leaf, Tree
from depthfuse.acceleration.running.execution import run_plan
from depthfuse.errors import AccelerationError, ExportError
from depthfuse.merging.model_inputs import check_one_device
from depthfuse.merging.supernet import Supernet
from depthfuse.runs.weights import load

BATCH, SIZES, NONE = DYNAMIC = ("batch", "sizes", "none")  # which sizes of the inputs are left open


@dataclass(frozen=True, eq=False)
class Subject:
    """model: what the exported file is to compute, in evaluation mode; a plan that was loaded without its model stands
    for itself. plan: the same as one graph. call: the example, of two images at least where the batch is open.
    dynamic: one of `DYNAMIC`.
    """

    model: nn.Module
    plan: Plan
    call: Call
    dynamic: str

    def name(self) -> str:
        """Of the model's class."""
        return self.plan.model

    def open_axes(self) -> tuple[dict[int, str], ...]:
        """For each input {axis that is open: its name}."""
        if self.dynamic == NONE:
            return tuple({} for _ in self.call.tensors)
        batch = self.call.tensors[0].shape[0]
        sizes = {2: "height", 3: "width"} if self.dynamic == SIZES else {}
        return tuple(
            ({0: "batch"} if x.dim() and x.shape[0] == batch else {}) | (sizes if x.dim() == 4 else {})
            for x in self.call.tensors
        )

    def input_names(self) -> list[str]:
        """As the arguments of the model's `forward` are called."""
        assert isinstance(self.call.tree, Container)
        by_position, by_name = self.call.tree.children
        assert isinstance(by_position, Container) and isinstance(by_name, Container)
        parameters = self.plan.signature.parameters
        known = [name for name, kind, _ in parameters if kind.startswith("POSITIONAL")]
        names = known + [f"input_{index}" for index in range(len(known), len(by_position.children))]
        pairs = [*zip(names, by_position.children, strict=False)]
        pairs += zip(map(str, by_name.keys), by_name.children, strict=True)
        return _unique([leaf for name, tree in pairs for leaf in _leaves(tree, name)])

    def output_names(self) -> list[str]:
        """By the keys of what the model returns, or by number; "output" for a single tensor."""
        outputs = self.plan.outputs
        assert outputs is not None
        if isinstance(outputs, Container) and outputs.keys:
            pairs = zip(map(str, outputs.keys), outputs.children, strict=True)
            return _unique([leaf for name, tree in pairs for leaf in _leaves(tree, name)])
        return _unique(_leaves(outputs, "output"))

    def output_shapes(self) -> list[tuple[int, ...]]:
        """For the example. Raises ExportError where the model returns a number that depends on sizes."""
        with torch.no_grad():
            outputs = as_tuple(self.plan.module(*self.call.on_clones().tensors))
        for name, value in zip(self.output_names(), outputs, strict=True):
            if not isinstance(value, Tensor):
                raise ExportError(
                    f"{self.name()} returns a {type(value).__name__} as {name}, and files give tensors alone"
                )
        return [tuple(value.shape) for value in outputs]


def _leaves(tree: Tree, name: str) -> list[str]:
    if isinstance(tree, Leaf):
        return [name]
    if isinstance(tree, Constant):
        return []
    names = tree.keys or range(len(tree.children))
    return [
        leaf
        for key, child in zip(names, tree.children, strict=True)
        for leaf in _leaves(child, f"{name}_{key}")
    ]


def _unique(names: list[str]) -> list[str]:
    return names if len(set(names)) == len(names) else [f"{name}_{i}" for i, name in enumerate(names)]


class _PlanAlone(nn.Module):
    """A plan as a model: without the model that it was made from it is all that there is to compare with."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.graph = copy.deepcopy(plan.module)
        self._plan = plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = Call.of(*self._plan.signature.bind(args, kwargs))
        return run_plan(replace(self._plan, module=self.graph), call)


def loaded(what: str | Path) -> nn.Module:
    """The merged model of a run's folder, or what `AcceleratedModel.save` wrote. Raises CheckpointError, SpecError."""
    path = Path(what)
    return load(path) if path.is_dir() else load_accelerated(path, tune="off")


def subject_of(
    model: nn.Module,
    x: Tensor | tuple[Any, ...] | None,
    example_kwargs: dict[str, Any] | None,
    dynamic: str,
    on_cpu: bool,
) -> Subject:
    """Copy a model, fold it, and see that it takes the sizes that are to be left open.

    on_cpu: wherever the model is.

    Raises ExportError, saying what to export instead.
    """
    if isinstance(model, AcceleratedModel):
        if model.original is None:
            return _subject_of_loaded(model, x, example_kwargs, dynamic, on_cpu)
        if x is None and example_kwargs is None:
            x, example_kwargs = model.made.example_call().arguments()
        model = model.original
    _check(model)
    dtype = main_dtype(model)
    assert dtype is not None
    if x is None:
        x = () if example_kwargs else _default_input(model, dtype)
    args = x if isinstance(x, tuple) else (x,)
    try:
        call = _of_two(Call.of(*signature_of(model).bind(args, example_kwargs or {})), dynamic)
        own = own_copy(model)
        if on_cpu:
            own, call = own.cpu(), replace(call, tensors=tuple(x.cpu() for x in call.tensors))
        plan = build_whole_plan(own, own, call, "reference", dynamic != NONE)
    except TypeError as error:
        raise ExportError(f"{type(model).__name__} does not take the example: {error}") from error
    except AccelerationError as error:
        raise ExportError(
            f"{type(model).__name__} cannot be exported: it does not become one graph for such a call: {error}"
        ) from error
    subject = Subject(own, plan, call, dynamic)
    _check_open(subject)
    return subject


def _check(model: nn.Module) -> None:
    training = next((name or "the model itself" for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ExportError(f"the model is in training mode ({training}): call model.eval() first")
    if isinstance(model, Supernet):
        raise ExportError("a supernet holds each block in all its forms: export depthfuse.merge(subnet)")
    if main_dtype(model) is None:
        raise ExportError(f"{type(model).__name__} has no weights: there is nothing to export")
    check_one_device(model, ExportError, needs_values=True)


def _default_input(model: nn.Module, dtype: torch.dtype) -> Tensor:
    device = next(t.device for t in [*model.parameters(), *model.buffers()] if t.dtype == dtype)
    try:
        return default_input(model, dtype, device)
    except AccelerationError as error:
        raise ExportError(str(error)) from error


def _of_two(call: Call, dynamic: str) -> Call:
    """The call with a second image where there is one: PyTorch takes a single one for what is there to be broadcast."""
    batch = call.tensors[0].shape[0] if call.tensors and call.tensors[0].dim() else 0
    if dynamic == NONE or batch != 1:
        return call
    doubled = (torch.cat([x, x]) if x.dim() and x.shape[0] == batch else x for x in call.tensors)
    return replace(call, tensors=tuple(doubled))


def _check_open(subject: Subject) -> None:
    """Raise ExportError where a size is to be left open that the model fixes."""
    form = subject.plan.form
    assert form is not None
    for name, shape, axes in zip(subject.input_names(), form.sizes.shapes, subject.open_axes(), strict=True):
        fixed = {axis: label for axis, label in axes.items() if isinstance(shape[axis], int)}
        for axis, label in fixed.items():
            instead = BATCH if label != "batch" else NONE
            raise ExportError(
                f"{subject.name()} takes a {label} of {shape[axis]} only (axis {axis} of {name}): it cannot be left "
                f"open; export with dynamic={instead!r}"
            )


def _subject_of_loaded(
    fast: AcceleratedModel,
    x: Tensor | tuple[Any, ...] | None,
    example_kwargs: dict[str, Any] | None,
    dynamic: str,
    on_cpu: bool,
) -> Subject:
    """Of a plan without the model that it was made from."""
    plan = fast.made
    if on_cpu and plan.device.type != "cpu":
        raise ExportError(
            f"this {plan.model} was loaded onto {plan.device}: load it onto the CPU to export it"
        )
    if not isinstance(plan.module, fx.GraphModule) or plan.form is None:
        raise ExportError(
            f"this {plan.model} was accelerated in parts, and the file does not hold the code between them: export "
            "the model that it was made from"
        )
    if x is None and example_kwargs is None:
        call = plan.example_call()
    else:
        args = () if x is None else x if isinstance(x, tuple) else (x,)
        call = plan.cast(Call.of(*plan.signature.bind(args, example_kwargs or {})))
    call = _of_two(call, dynamic)
    subject = Subject(_PlanAlone(plan).eval(), plan, call, dynamic)
    _check_open(subject)
    if not plan.form.takes(call):
        raise ExportError(
            f"this {plan.model} was accelerated for other calls than {call}: export the model that it was made from"
        )
    return subject
