"""`depthfuse accelerate`: a model, accelerated for this machine, as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from depthfuse.acceleration import AcceleratedModel, load_accelerated
from depthfuse.acceleration import accelerate as accelerate_model
from depthfuse.cli.command import Invocation
from depthfuse.cli.models import (
    chosen_device,
    merged_model,
    model_of,
    refuse_for,
    require_positive,
    run_folder,
)
from depthfuse.cli.tables import print_plain
from depthfuse.config import DTYPES
from depthfuse.errors import CheckpointError, UsageError

_VERIFY = {"outputs": True, "blocks": "blocks", "off": False}


@dataclass
class AccelerateArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A name of timm's, torchvision:NAME, package.module:factory, the output folder of a run that has been merged, or a
    file that this command wrote."""
    out: Path
    """The file to write, such as fast.safetensors. An earlier one is replaced once the new one is whole."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of what builds it (timm.create_model), as name=value."""
    pretrained: bool = False
    """Take timm's pretrained weights."""
    weights: Path | None = None
    """Take weights of your own: a safetensors file of the model's state dict."""
    batch: int | None = None
    """Batch size to choose the fastest for; any other runs, too. Default 1."""
    dtype: Literal["fp32", "bf16", "fp16", "auto"] | None = None
    """auto: what is fast on the device. Default fp32."""
    device: str | None = None
    """Default: the GPU where there is one."""
    backend: Literal["auto", "triton", "reference"] | None = None
    """Default auto: Triton on a GPU."""
    tune: Literal["measure", "heuristic", "off"] = "measure"
    """How implementations are chosen: by measuring them here, by what usually is best, or not at all. A file that was
    tuned on a machine like this one keeps its choice."""
    engines: tuple[
        Literal["auto", "own", "openvino", "onnxruntime", "executorch", "torch.compile", "zentorch"], ...
    ] = ("auto",)
    """Whose engines besides ours are measured for the whole model on a CPU: auto (OpenVINO and ONNX Runtime where they
    are installed), own (none), or names."""
    verify: Literal["outputs", "blocks", "off"] | None = None
    """Compare with the model: its outputs, or also every operation, against float64. Default outputs."""


def accelerate(invocation: Invocation) -> None:
    given = invocation.settings(AccelerateArguments)
    if given.out.is_dir():
        raise UsageError(f"--out {given.out} is a folder: give the file to write, such as fast.safetensors")
    if given.batch is not None:
        require_positive(batch=given.batch)
    device = chosen_device(given.device)
    if Path(given.model).suffix == ".safetensors" or Path(given.model).is_file():
        fast = _accelerated_anew(given, device)
    else:
        fast = _accelerated(given, device)
    replaces = given.out.exists()
    fast.save(given.out)
    print_plain(str(fast.report()))
    size_mib = given.out.stat().st_size / 2**20
    print_plain(
        f"written: {given.out} ({size_mib:.1f} MiB){', in place of an earlier file' if replaces else ''}"
    )
    where = "" if device.type == "cpu" else f', device="{device}"'
    print_plain(f'in Python: depthfuse.load_accelerated("{given.out}"{where})')


def _accelerated_anew(given: AccelerateArguments, device: torch.device) -> AcceleratedModel:
    """What another machine has accelerated; the file holds its plan, and the model it was made from is not needed."""
    refuse_for(
        f"{given.model}: a file that is accelerated already keeps what it was made from",
        model_kwargs=given.model_kwargs,
        pretrained=given.pretrained,
        weights=given.weights,
        batch=given.batch,
        dtype=given.dtype,
        backend=given.backend,
        verify=given.verify,
    )
    try:
        return load_accelerated(given.model, device, given.tune, _engines(given))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. A file is taken that `depthfuse accelerate` wrote; weights are given as "
            "`depthfuse accelerate MODEL --weights FILE`, and a run as its folder"
        ) from error


def _accelerated(given: AccelerateArguments, device: torch.device) -> AcceleratedModel:
    folder = run_folder(given.model)
    if folder is None:
        model, size = model_of(given.model, given.model_kwargs, given.pretrained, given.weights)
    else:
        settings = {name: getattr(given, name) for name in ("model_kwargs", "pretrained", "weights")}
        refuse_for(f"{folder}: a run names its model and brings the weights", **settings)
        model, size = merged_model(folder)
    batch = 1 if given.batch is None else given.batch
    x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    dtype = given.dtype or "fp32"
    return accelerate_model(
        model.to(device),
        x.to(device),
        dtype="auto" if dtype == "auto" else DTYPES[dtype],
        backend=given.backend or "auto",
        verify=_VERIFY[given.verify or "outputs"],
        tune=given.tune,
        engines=_engines(given),
    )


def _engines(given: AccelerateArguments) -> str | tuple[str, ...]:
    alone = [name for name in given.engines if name in ("auto", "own")]
    if alone and len(given.engines) > 1:
        raise UsageError(f"--engines {alone[0]} stands alone: give it, or names of engines")
    return alone[0] if alone else given.engines
