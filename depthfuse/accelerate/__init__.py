"""`accelerate`: give a model, get one that computes the same, faster, and cannot be trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from depthfuse.accelerate.build import build_plan
from depthfuse.accelerate.errors import AccelerationError
from depthfuse.accelerate.model import AcceleratedModel
from depthfuse.accelerate.onednn_graph import compile_plan
from depthfuse.accelerate.report import Entry, Report
from depthfuse.accelerate.tune import choose_chunk, choose_implementations, clearly_faster, measure_ms
from depthfuse.accelerate.verify import verify as verify_plan
from depthfuse.ops import resolve_backend

__all__ = ["AcceleratedModel", "AccelerationError", "Entry", "Report", "accelerate"]


def accelerate(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    verify: bool = True,
    tune: str = "measure",
) -> AcceleratedModel:
    """Replace convolution and linear chains by fused modules and check that nothing else changed.

    Args:
        model: any module in evaluation mode; best a merged or plain timm model. It is left alone.
        example_inputs: one tensor or a tuple of them, as the model takes them. Default: noise of the input
            size that the model's `pretrained_cfg` gives, batch 1. Packed weights suit its size best and are
            right for any.
        dtype: float32, float16, bfloat16 or float64 for the result; default the model's own.
        backend: "auto", "triton" or "reference", see `depthfuse.ops.resolve_backend`.
        verify: compare outputs with the model's on the example input.
        tune: "measure" runs the implementations of every distinct shape on this machine and takes the fastest (one
            to a few seconds); "heuristic" takes the usual best without running any.

    Returns:
        An AcceleratedModel; `print(result.report())` shows what was fused.

    Raises:
        AccelerationError: the model is in training mode, the example input does not go through it, no input
            size is known, or the outputs differ (the worst layer is named).
        depthfuse.ops.BackendError: a backend asked for by name cannot run here.
    """
    training = next((name or "the model itself" for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise AccelerationError(f"the model is in training mode ({training}): call model.eval() first")
    tensor = next((p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()), None)
    if tensor is None:
        raise AccelerationError(f"{type(model).__name__} has no weights: there is nothing to accelerate")
    dtype = dtype or tensor.dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise AccelerationError(f"dtype is {dtype}, expected float32, float16, bfloat16 or float64")
    if tune not in ("measure", "heuristic"):
        raise ValueError(f"tune is {tune!r}, expected 'measure' or 'heuristic'")
    resolve_backend(backend, tensor.device)
    if example_inputs is None:
        example_inputs = _default_input(model, tensor)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    _try_inputs(model, inputs, tensor)
    measure = tune == "measure"
    plan = build_plan(model, inputs, dtype, backend)
    accelerated = AcceleratedModel(plan.module, dtype, _in_channels(inputs))
    given = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    choose_implementations(plan.module, given, measure=False)
    executor = "op by op"
    if measure and tensor.device.type == "cpu" and resolve_backend(backend, "cpu")[0] == "reference":
        executor = _measure_executors(accelerated, given)
    entries = tuple(
        replace(entry, implementation=plan.module.get_submodule(entry.name).implementation())
        if entry.fused
        else entry
        for entry in plan.entries
    )
    where = (type(model).__name__, str(dtype).removeprefix("torch."), str(tensor.device))
    accelerated.set_report(Report(*where, entries, executor, None))
    if verify:
        error = verify_plan(accelerated, model, inputs)
        accelerated.set_report(replace(accelerated.report(), max_relative_error=error))
    return accelerated


def _measure_executors(accelerated: AcceleratedModel, inputs: tuple[Tensor, ...]) -> str:
    """Choose how many images run at a time, each op's implementation, and whether oneDNN Graph runs them all.

    Returns:
        What runs the plan, in words.
    """
    plan = accelerated.plan
    accelerated.chunk = choose_chunk(plan, inputs)
    part = inputs if accelerated.chunk is None else tuple(x[: accelerated.chunk] for x in inputs)
    choose_implementations(plan, part, measure=True)
    executor = "op by op"
    compiled = compile_plan(plan, part)
    if compiled is not None:
        with torch.no_grad():
            latency_ms = measure_ms({"plan": lambda: plan(*part), "compiled": lambda: compiled(*part)})
        if clearly_faster("compiled", "plan", latency_ms):
            accelerated.set_compiled(compiled, part)
            shapes = " and ".join(str(list(x.shape)) for x in part)
            executor = f"oneDNN Graph for {shapes}, op by op for other shapes"
    return executor if accelerated.chunk is None else f"{executor}, {accelerated.chunk} images at a time"


def _in_channels(inputs: tuple[Tensor, ...]) -> int | None:
    """How many channels image inputs must have, where the model takes one image tensor."""
    return inputs[0].shape[1] if len(inputs) == 1 and inputs[0].dim() == 4 else None


def _default_input(model: nn.Module, like: Tensor) -> Tensor:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size")
    if size is None:
        raise AccelerationError(
            f"{type(model).__name__} has no pretrained_cfg with an input_size: pass example_inputs, for "
            "instance torch.randn(1, 3, 224, 224)"
        )
    channels, height, width = size
    image_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if image_size is not None:
        height, width = image_size
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.groups == 1:
        channels = getattr(model, "in_chans", None) or (
            first.in_channels if first.in_channels <= 16 else channels
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, height, width, generator=generator).to(like.device, like.dtype)


def _try_inputs(model: nn.Module, inputs: tuple[Tensor, ...], like: Tensor) -> None:
    for x in inputs:
        if not isinstance(x, Tensor):
            raise AccelerationError(f"example_inputs holds a {type(x).__name__}, expected tensors")
        if x.is_floating_point() and x.dtype != like.dtype:
            raise AccelerationError(
                f"the example input has dtype {x.dtype}, expected the model's {like.dtype}"
            )
        if x.device != like.device:
            raise AccelerationError(f"the example input is on {x.device}, expected the model's {like.device}")
    try:
        with torch.no_grad():
            model(*(x.clone() for x in inputs))  # some models write over their input
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in inputs)
        raise AccelerationError(f"the model does not take the example input ({shapes}): {error}") from error
