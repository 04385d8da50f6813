"""Save an accelerated model, and load it without the model it was made from.

One safetensors file holds the tensors, and in its metadata the plan as JSON (`describe.py`) with a checksum over both.
Modules that only the model's own code can build are taken out of the timm model that its
`ModelSource` builds; `save` tries that out, and names them where it does not work.

What was chosen by measurement is saved too. It holds where device, threads, versions and source are the same; elsewhere
the plan is tuned anew.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.checking.report import Entry, Report
from depthfuse.acceleration.checking.verify import TOLERANCE, relative_error
from depthfuse.acceleration.planning.parts import tensors_in
from depthfuse.acceleration.running.choose import Execution, apply_execution, fingerprint, tune_plan
from depthfuse.acceleration.running.model import AcceleratedModel
from depthfuse.acceleration.saving.describe import (
    DescriptionError,
    IndescribableError,
    describe,
    rebuild,
    sources,
)
from depthfuse.checkpoint import load_tensors, save_tensors
from depthfuse.errors import AccelerationError, CheckpointError, SpecError
from depthfuse.fused.layers import FusedModule, plain_ops
from depthfuse.measuring.measured_cache import environment
from depthfuse.merging.tracing import has_hooks
from depthfuse.shapes import bytes_of_source
from depthfuse.spec import ModelSource
from depthfuse.untrusted import MALFORMED, parse_json

logger = logging.getLogger(__name__)

FORMAT = "depthfuse.accelerated/1"


def save_accelerated(accelerated: AcceleratedModel, path: str | Path) -> None:
    """Write `accelerated` to one file, atomically. See `AcceleratedModel.save`."""
    watched = [name or "the model itself" for name, m in accelerated.plan.named_modules() if has_hooks(m)]
    if watched:
        raise AccelerationError(
            f"cannot save this model: {watched[0]} has hooks or parametrizations, which a file cannot hold: remove "
            "them and accelerate it again"
        )
    try:
        plan = describe(accelerated.plan)
    except IndescribableError as error:
        raise AccelerationError(f"cannot save this model: its plan holds {error}") from error
    tensors = {name: tensor.cpu() for name, tensor in accelerated.plan.state_dict().items()}
    _try_out(accelerated, plan, tensors)
    report = accelerated.report()
    document = {
        "dtype": str(accelerated.dtype),
        "in_channels": accelerated.in_channels,
        "example": [[list(shape), str(dtype)] for shape, dtype in accelerated.example],
        "source": asdict(accelerated.source) if accelerated.source and sources(plan) else None,
        "plan": plan,
        "report": asdict(replace(report, entries=tuple(replace(e, cost=None) for e in report.entries))),
        "tuned": {
            "environment": environment(accelerated.device),
            "execution": accelerated.execution.document(),
            "implementations": {
                name: module.implementation()
                for name, module in accelerated.plan.named_modules()
                if isinstance(module, FusedModule)
            },
        },
    }
    try:
        text = json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AccelerationError(f"cannot save this model: its description is no JSON: {error}") from error
    save_tensors(path, tensors, {"format": FORMAT, "document": text})


def load_accelerated(
    path: str | Path, device: torch.device | str = "cpu", tune: str = "measure"
) -> AcceleratedModel:
    """Load what `AcceleratedModel.save` wrote; the model it was made from is not needed.

    Args:
        path: the file. device: where it shall run.
        tune: as for `depthfuse.accelerate`, where what was chosen when it was saved does not hold: on another device,
            with other threads or versions. There is no model here to compare the whole plan with.

    Raises:
        CheckpointError: a file that is missing, damaged, or was written by another version.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is of format {metadata.get('format')!r}, expected {FORMAT!r}: save it again with this version"
        )
    try:
        document = parse_json(metadata["document"])
        accelerated = _build(document, tensors).to(device)
        _tune(accelerated, document["tuned"], tune)
    except (DescriptionError, SpecError, *MALFORMED) as error:
        raise CheckpointError(
            f"{path} holds no plan that this version understands ({error}): save it again with this version"
        ) from error
    return accelerated


def _build(document: dict[str, Any], tensors: dict[str, Tensor]) -> AcceleratedModel:
    source = None
    if document["source"] is not None:
        source = ModelSource.of_document(document["source"]["name"], dict(document["source"]["arguments"]))
    dtype = _dtype(document["dtype"])
    plan = _rebuild_plan(document["plan"], tensors, dtype, source)
    entries = tuple(_entry(entry) for entry in document["report"].pop("entries"))
    report = Report(**document["report"], entries=entries)
    example = tuple((tuple(shape), _dtype(name)) for shape, name in document["example"])
    return AcceleratedModel(plan, dtype, document["in_channels"], report, example, source)


def _rebuild_plan(
    description: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, source: ModelSource | None
) -> nn.Module:
    model = None
    if source is not None:
        model = source.build(at_most_bytes=bytes_of_source(tensors.values())).eval()

    def from_source(path: str) -> nn.Module:
        if model is None:
            raise DescriptionError(
                f"{path or 'the model'} is not described, and the file names no timm model"
            )
        return copy.deepcopy(model.get_submodule(path))

    plan = rebuild(description, tensors, from_source).to(dtype).eval().requires_grad_(False)
    plan.load_state_dict(tensors)
    return plan


def _tune(accelerated: AcceleratedModel, tuned: dict[str, Any], tune: str) -> None:
    inputs = example_inputs(accelerated)
    here, there = environment(accelerated.device), tuned["environment"]
    execution = Execution.from_document(tuned["execution"])
    if execution is not None and here == there:
        apply_execution(accelerated, execution, inputs, tuned["implementations"])
        return
    changed = [name for name in here if here[name] != there.get(name)]
    logger.info("tuning anew: another %s than where the model was saved", ", ".join(changed))
    tune_plan(accelerated, None, inputs, tune)


def example_inputs(accelerated: AcceleratedModel) -> tuple[Tensor, ...]:
    """Noise of the shapes and dtypes that the plan was made for; zeros for integers."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype, device=accelerated.device)
        return torch.randn(shape, generator=generator).to(accelerated.device, accelerated.dtype)

    return tuple(make(shape, dtype) for shape, dtype in accelerated.example)


def _try_out(accelerated: AcceleratedModel, plan: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise AccelerationError unless the description gives a plan of the same structure and the same outputs."""
    remedy = (
        "build the model by depthfuse.ModelSource.make(name, **arguments).build(), or save the model itself"
    )
    named = ", ".join(path or "the model as a whole" for path in sources(plan))
    try:
        twin = _rebuild_plan(plan, tensors, accelerated.dtype, accelerated.source if named else None)
    except (DescriptionError, SpecError, RuntimeError) as error:
        what = f"{named} cannot be built without the model's own code" if named else "its plan"
        raise AccelerationError(f"cannot save this model: {what} ({error}); {remedy}") from error
    same = fingerprint(twin) == fingerprint(accelerated.plan)
    if same and named:  # settings that no repr shows
        inputs = example_inputs(accelerated)
        with torch.no_grad(), plain_ops():
            ours = tensors_in(accelerated.plan(*(x.clone() for x in inputs)))
            theirs = tensors_in(twin.to(accelerated.device)(*(x.clone() for x in inputs)))
        errors = [relative_error(t, o) for t, o in zip(theirs, ours, strict=True)]
        same = all(error <= TOLERANCE[accelerated.dtype] for error in errors)
    if not same:
        known = (
            f"timm builds it otherwise from {accelerated.source}"
            if named
            else "its plan is rebuilt otherwise"
        )
        raise AccelerationError(f"cannot save this model: {named or 'all'}: {known}; {remedy}")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise DescriptionError(f"{name!r} is no dtype")
    return dtype


def _entry(document: dict[str, Any]) -> Entry:
    return Entry(**{key: tuple(v) if isinstance(v, list) else v for key, v in document.items()})
