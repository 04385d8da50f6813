"""A plan and what was chosen for it as one file, and back, without the model it was made from.

One safetensors file holds the tensors, and in its metadata the plan as JSON (`describe.py`) with a checksum over both.
Modules that only the model's own code can build are taken out of the timm model that its `ModelSource` builds;
`save_plan` tries that out, and names them where it does not work.

What was chosen by measurement is saved too. It holds where device, threads, versions and source are the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.checking.report import Report
from depthfuse.acceleration.planning.leftovers import sources_forgotten
from depthfuse.acceleration.planning.own import cast_main
from depthfuse.acceleration.planning.plan import Entry, Example, Plan
from depthfuse.acceleration.planning.trees import flatten
from depthfuse.acceleration.running.choose import fingerprint
from depthfuse.acceleration.running.execution import Execution, run_plan
from depthfuse.acceleration.saving.describe import (
    DescriptionError,
    IndescribableError,
    describe,
    describe_form,
    describe_signature,
    describe_tree,
    leaves_of,
    rebuild,
    rebuild_form,
    rebuild_signature,
    rebuild_tree,
    sources,
)
from depthfuse.checkpoint import load_tensors, save_tensors
from depthfuse.errors import AccelerationError, CheckpointError, SpecError
from depthfuse.fused.layers import plain_ops
from depthfuse.measured_cache import environment
from depthfuse.measuring.accuracy import TOLERANCE, relative_error
from depthfuse.merging.tracing import has_hooks
from depthfuse.shapes import bytes_of_source
from depthfuse.spec import ModelSource
from depthfuse.untrusted import MALFORMED, is_out_of_memory, parse_json

FORMAT = "depthfuse.accelerated/4"


@dataclass(frozen=True)
class Saved:
    """What a file holds. implementations: of each fused module, by its path in the plan. environment: where all that
    was chosen, see `depthfuse.measured_cache.environment`."""

    plan: Plan
    execution: Execution
    report: Report
    implementations: Mapping[str, str]
    environment: Mapping[str, Any]


def save_plan(path: str | Path, plan: Plan, execution: Execution, report: Report) -> None:
    """Write a plan to one file, atomically. See `AcceleratedModel.save` for what is raised."""
    watched = [name or "the model itself" for name, m in plan.module.named_modules() if has_hooks(m)]
    if watched:
        raise AccelerationError(
            f"cannot save this model: {watched[0]} has hooks or parametrizations, which a file cannot hold: remove "
            "them and accelerate it again"
        )
    try:
        description = describe(plan.module)
        calls = {
            "tree": describe_tree(plan.tree),
            "signature": describe_signature(plan.signature),
            "form": None if plan.form is None else describe_form(plan.form),
            "outputs": None if plan.outputs is None else describe_tree(plan.outputs),
            "writes_inputs": plan.writes_inputs,
        }
    except IndescribableError as error:
        raise AccelerationError(f"cannot save this model: its plan holds {error}") from error
    tensors = {name: tensor.cpu() for name, tensor in plan.module.state_dict().items()}
    _try_out(plan, description, tensors)
    document = {
        "dtype": str(plan.dtype),
        "calls": calls,
        "example": [[list(shape), str(dtype)] for shape, dtype in plan.example],
        "source": asdict(plan.source) if plan.source and sources(description) else None,
        "plan": description,
        "report": asdict(replace(report, entries=tuple(replace(e, cost=None) for e in report.entries))),
        "tuned": {
            "environment": environment(plan.device),
            "execution": execution.document(),
            "implementations": {name: m.implementation() for name, m in plan.fused_modules().items()},
        },
    }
    try:
        text = json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AccelerationError(f"cannot save this model: its description is no JSON: {error}") from error
    save_tensors(path, tensors, {"format": FORMAT, "document": text})


def read_plan(path: str | Path) -> Saved:
    """Read what `save_plan` wrote, on the CPU.

    Raises:
        CheckpointError: a file that is missing, damaged, or was written by another version.
    """
    tensors, metadata = load_tensors(path)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise CheckpointError(
            f"{path} is of format {found!r}, expected {FORMAT!r}: save it again with this version"
        )
    try:
        return _read(parse_json(metadata["document"]), tensors)
    except (DescriptionError, SpecError, *MALFORMED) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} holds no plan that this version understands ({error}): save it again with this version"
        ) from error


def _read(document: dict[str, Any], tensors: dict[str, Tensor]) -> Saved:
    source = None
    if document["source"] is not None:
        source = ModelSource.of_document(document["source"]["name"], dict(document["source"]["arguments"]))
    dtype = _dtype(document["dtype"])
    module = _rebuild(document["plan"], tensors, dtype, source)
    tuned, found = document["tuned"], document["report"]
    entries = tuple(_entry(entry) for entry in found.pop("entries"))
    report = Report(**found, entries=entries)
    example = tuple((_shape(shape), _dtype(name)) for shape, name in document["example"])
    plan = Plan(
        module, entries, report.model, dtype, example, source, **_calls(document["calls"], module, example)
    )
    fused, implementations = plan.fused_modules(), tuned["implementations"]
    if set(fused) != set(implementations) or not all(isinstance(n, str) for n in implementations.values()):
        named = ", ".join(sorted(set(fused) ^ set(implementations))) or "a fused module"
        raise DescriptionError(f"no implementation is named for {named}")
    execution = Execution.from_document(tuned["execution"])
    if execution is None:
        raise DescriptionError(f"{tuned['execution']!r} says not how a plan runs")
    if not isinstance(tuned["environment"], dict):
        raise DescriptionError(f"{tuned['environment']!r} is no environment")
    return Saved(plan, execution, report, implementations, tuned["environment"])


def _calls(document: dict[str, Any], module: nn.Module, example: Example) -> dict[str, Any]:
    """The fields of a plan that say how it is called."""
    tree, signature = rebuild_tree(document["tree"]), rebuild_signature(document["signature"])
    form = None if document["form"] is None else rebuild_form(document["form"])
    outputs = None if document["outputs"] is None else rebuild_tree(document["outputs"])
    is_graph = isinstance(module, fx.GraphModule)
    if is_graph != (form is not None) or is_graph != (outputs is not None):
        raise DescriptionError("a graph, and only a graph, has a form of its calls and outputs")
    if leaves_of(tree) != set(range(len(example))) or type(document["writes_inputs"]) is not bool:
        raise DescriptionError("the example is not what the plan is called with")
    return {
        "signature": signature,
        "tree": tree,
        "form": form,
        "outputs": outputs,
        "writes_inputs": document["writes_inputs"],
    }


def _rebuild(
    description: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, source: ModelSource | None
) -> nn.Module:
    model = None
    if source is not None:
        model = cast_main(source.build(at_most_bytes=bytes_of_source(tensors.values())).eval(), dtype)

    def from_source(path: str) -> nn.Module:
        if model is None:
            raise DescriptionError(
                f"{path or 'the model'} is not described, and the file names no timm model"
            )
        return copy.deepcopy(model.get_submodule(path))

    with sources_forgotten() as kept:
        module = rebuild(description, tensors, from_source).eval().requires_grad_(False)
        kept.append(module)
    module.load_state_dict(tensors)
    return module


def _try_out(plan: Plan, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise AccelerationError unless the description gives a plan of the same structure and the same outputs."""
    remedy = (
        "build the model by depthfuse.ModelSource.make(name, **arguments).build(), or save the model itself"
    )
    named = ", ".join(path or "the model as a whole" for path in sources(description))
    try:
        twin = _rebuild(description, tensors, plan.dtype, plan.source if named else None)
    except (DescriptionError, SpecError, RuntimeError) as error:
        what = f"{named} cannot be built without the model's own code" if named else "its plan"
        raise AccelerationError(f"cannot save this model: {what} ({error}); {remedy}") from error
    same = fingerprint(twin) == fingerprint(plan.module)
    if same and named:  # settings that no repr shows
        ours, theirs = (
            _outputs(replace(plan, module=module)) for module in (plan.module, twin.to(plan.device))
        )
        errors = [relative_error(t, o) for t, o in zip(theirs, ours, strict=True)]
        same = all(error <= TOLERANCE[plan.dtype] for error in errors)
    if not same:
        known = f"timm builds it otherwise from {plan.source}" if named else "its plan is rebuilt otherwise"
        raise AccelerationError(f"cannot save this model: {named or 'all'}: {known}; {remedy}")


def _outputs(plan: Plan) -> list[Tensor]:
    with torch.no_grad(), plain_ops():
        leaves, _ = flatten(run_plan(plan, plan.example_call()))
    return [x for x in leaves if isinstance(x, Tensor)]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise DescriptionError(f"{name!r} is no dtype")
    return dtype


def _shape(sizes: list[int]) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise DescriptionError(f"{sizes!r} is no shape")
    return tuple(sizes)


def _entry(document: dict[str, Any]) -> Entry:
    return Entry(**{key: tuple(v) if isinstance(v, list) else v for key, v in document.items()})
