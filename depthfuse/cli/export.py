"""`depthfuse export`: a model as a file for the runtime that it is deployed with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

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
from depthfuse.data import DataConfig, has_no_classes, open_data
from depthfuse.errors import DepthfuseError, UsageError
from depthfuse.exporting import export as export_model
from depthfuse.merging.model_inputs import input_size


@dataclass
class ExportArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A name of timm's, torchvision:NAME, package.module:factory, the output folder of a run that has been merged, or a
    file that `depthfuse accelerate` wrote."""
    to: Literal["onnx", "openvino", "torch", "aoti", "executorch", "tensorrt", "migraphx"]
    """onnx: ONNX Runtime. torch: torch.export. aoti: AOTInductor, compiled for the device. executorch: on XNNPACK.
    tensorrt, migraphx: the ONNX file that these read."""
    out: Path
    """The file to write: .onnx, .xml for OpenVINO (.bin comes beside it), .pt2 for torch and aoti, .pte for ExecuTorch.
    An earlier one is replaced once the new one is whole and checked."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of what builds it (timm.create_model), as name=value."""
    pretrained: bool = False
    """Take timm's pretrained weights."""
    weights: Path | None = None
    """Take weights of your own: a safetensors file of the model's state dict."""
    batch: int | None = None
    """Images of the example, which with --dynamic none is all that the file takes. Default 1."""
    dynamic: Literal["batch", "sizes", "none"] = "batch"
    """Which sizes the file leaves open: the batch, also height and width, or none."""
    largest_batch: int | None = None
    """The end of an open batch. Default: 64 for ExecuTorch, none for the others."""
    classes: tuple[str, ...] = ()
    """Names of the outputs, for the file's facts. Default: what the run says."""
    mean: tuple[float, ...] = ()
    """What images are normalised by, for the file's facts. Default: what the run, or timm, says."""
    std: tuple[float, ...] = ()
    check: bool = True
    """Compare what the file computes in its runtime with the model, in float64."""
    precision: Literal["float", "int8"] = "float"
    """int8, for onnx and openvino: weights and activations in 8 bits, by ranges from images, the loss measured in the
    runtime; layers that lose too much stay in float."""
    points: float | None = None
    """How much of the run's score the file may lose in 8 bits, in points. Default 0.5; where there are no classes, 5 in
    agreement with the model itself."""
    calibration: str | None = None
    """Images for int8: a folder, or a data set by a name that --data.data takes; without their classes, as the model
    may call them otherwise. Default: the run's data, and its score."""
    calibration_images: int = 300
    """Images that ranges are taken from; the loss is measured on others."""
    equalise: bool = False
    """Scale channels between layers before that, which changes no output."""
    device: str | None = None
    """For aoti. Default: the GPU where there is one."""


def export(invocation: Invocation) -> None:
    given = invocation.settings(ExportArguments)
    require_positive(batch=1 if given.batch is None else given.batch)
    if given.device is not None and given.to != "aoti":
        raise UsageError(f"--device is for aoti: files for {given.to} run wherever their runtime does")
    model, x = _model_and_example(given)
    try:
        written = export_model(
            model,
            x,
            given.out,
            given.to,
            dynamic=given.dynamic,
            largest_batch=given.largest_batch,
            classes=given.classes or None,
            mean=given.mean or None,
            std=given.std or None,
            check=given.check,
            precision=given.precision,
            calibration=_images(given, model),
            calibration_images=given.calibration_images,
            points=given.points,
            equalise=given.equalise,
        )
    except DepthfuseError:
        raise
    except ValueError as error:  # an ending, or a number, that makes no sense
        raise UsageError(str(error)) from error
    print_plain(f"written: {written}")
    if written.quantisation is not None:
        print_plain(written.quantisation.worst())


def _model_and_example(given: ExportArguments) -> tuple[nn.Module | Path, Tensor | None]:
    settings = {name: getattr(given, name) for name in ("model_kwargs", "pretrained", "weights")}
    if Path(given.model).suffix == ".safetensors" or Path(given.model).is_file():
        refuse_for(f"{given.model}: a file that is accelerated keeps what it was made from", **settings)
        refuse_for(f"{given.model}: a file that is accelerated keeps its example", batch=given.batch)
        return Path(given.model), None
    device = chosen_device(given.device) if given.to == "aoti" else torch.device("cpu")
    batch = 1 if given.batch is None else given.batch
    folder = run_folder(given.model)
    if folder is not None:
        refuse_for(f"{folder}: a run names its model and brings the weights", **settings)
        _, size = merged_model(folder)
        return folder, torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    model, size = model_of(given.model, given.model_kwargs, given.pretrained, given.weights)
    x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    return model.to(device), x.to(device)


def _images(given: ExportArguments, model: nn.Module | Path) -> Iterator[Tensor] | None:
    """Of --calibration, prepared as the model takes them."""
    if given.calibration is None:
        return None
    if isinstance(model, nn.Module):
        net, (channels, size, _) = model, input_size(model)
    elif model.is_dir():
        net, (channels, size, _) = merged_model(model)
    else:
        raise UsageError(
            f"{model}: how images are prepared for it, the file does not say; give the model that it was made from"
        )
    config = DataConfig(data=given.calibration, img_size=size, holdout=0.0, batch_size=1)
    data = open_data(
        config,
        num_classes=2 if has_no_classes(config) else None,  # any number: nobody asks for them
        in_chans=channels,
        model_cfg=getattr(net, "pretrained_cfg", None),
    )
    # as many again to judge by
    return (images for images, _ in data.calibration_loader(2 * given.calibration_images))
