"""`accelerate`: give a model, get one that computes the same, faster, and cannot be trained."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import torch
from torch import Tensor, nn

from depthfuse.acceleration.checking.report import Cost, Entry, Report
from depthfuse.acceleration.checking.verify import compare_operations
from depthfuse.acceleration.checking.verify import verify as verify_plan
from depthfuse.acceleration.planning.build import build_plan
from depthfuse.acceleration.running.choose import tune_plan
from depthfuse.acceleration.running.implementations import TUNE
from depthfuse.acceleration.running.model import AcceleratedModel
from depthfuse.acceleration.saving.saved import load_accelerated
from depthfuse.errors import AccelerationError
from depthfuse.measuring.measured_cache import cache_folder, environment
from depthfuse.ops import onednn, resolve_backend
from depthfuse.spec import ModelSource

__all__ = [
    "AcceleratedModel",
    "AccelerationError",
    "Cost",
    "Entry",
    "Report",
    "accelerate",
    "cache_folder",
    "load_accelerated",
]


# Tracing patches PyTorch for the whole process, planning watches the model by hooks, and measuring wants to be alone.
_one_at_a_time = threading.Lock()


def accelerate(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    verify: bool | str = True,
    tune: str = "measure",
) -> AcceleratedModel:
    """Replace convolution and linear chains by fused modules and check that nothing else changed.

    Args:
        model: any module in evaluation mode; best a merged or plain timm model. It is left alone.
        example_inputs: one tensor or a tuple of them, as the model takes them. Default: noise of the input
            size that the model's `pretrained_cfg` gives, batch 1. Packed weights suit its size best and are
            right for any.
        dtype: float32, float16, bfloat16 or float64 for the result; default the model's own. "auto": what is fast where
            the model is, see `fast_dtype`.
        backend: "auto", "triton" or "reference", see `depthfuse.ops.resolve_backend`.
        verify: True compares outputs with the model's on the example input; "blocks" also gives the error of every
            operation against a float64 copy of the model, in the report; False does neither.
        tune: "measure" runs the implementations of every distinct shape on this machine and takes the fastest (one
            to a few seconds, kept for the next time in `cache_folder()`), then compares the whole with the model: where
            that is faster, a copy of it runs. "heuristic" takes the usual best without running any. "off" leaves the
            fused modules to the plain ops.

    Several threads may call this; they wait for each other. Other threads may run models meanwhile, but not this one.

    Returns:
        An AcceleratedModel; `print(result.report())` shows what was fused.

    Raises:
        AccelerationError: the model is in training mode, the example input does not go through it, no input
            size is known, or the outputs differ (the first wrong operation is named).
        ValueError: an unknown `tune`, `verify` or `backend`.
        depthfuse.ops.BackendError: a backend asked for by name cannot run here.
    """
    with _one_at_a_time:
        return _accelerate(model, example_inputs, dtype, backend, verify, tune)


def _accelerate(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | None,
    dtype: torch.dtype | str | None,
    backend: str,
    verify: bool | str,
    tune: str,
) -> AcceleratedModel:
    training = next((name or "the model itself" for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise AccelerationError(f"the model is in training mode ({training}): call model.eval() first")
    tensor = next((p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()), None)
    if tensor is None:
        raise AccelerationError(f"{type(model).__name__} has no weights: there is nothing to accelerate")
    dtype = fast_dtype(tensor.dtype, tensor.device) if dtype == "auto" else dtype or tensor.dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise AccelerationError(f"dtype is {dtype}, expected float32, float16, bfloat16, float64 or 'auto'")
    if tune not in TUNE:
        raise ValueError(f"tune is {tune!r}, expected one of {', '.join(map(repr, TUNE))}")
    if verify not in (True, False, "blocks"):
        raise ValueError(f"verify is {verify!r}, expected True, False or 'blocks'")
    resolve_backend(backend, tensor.device)
    if example_inputs is None:
        example_inputs = _default_input(model, tensor)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    _try_inputs(model, inputs, tensor)
    plan = build_plan(model, inputs, dtype, backend)
    report = Report(
        type(model).__name__,
        str(dtype).removeprefix("torch."),
        str(tensor.device),
        tuple(plan.entries),
        "op by op",
        None,
    )
    example = tuple((tuple(x.shape), x.dtype) for x in inputs)
    source = ModelSource.of(model)
    accelerated = AcceleratedModel(plan.module, dtype, _in_channels(inputs), report, example, source)
    tune_plan(accelerated, model, inputs, tune)
    if verify:
        error = verify_plan(accelerated, model, inputs)
        accelerated.set_report(replace(accelerated.report(), max_relative_error=error))
    if verify == "blocks":
        entries = compare_operations(accelerated, copy.deepcopy(model).double(), inputs)
        accelerated.set_report(replace(accelerated.report(), entries=entries))
    return accelerated


def fast_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that `dtype="auto"` stands for.

    On a GPU float16, unless the model is in bfloat16 already and the card multiplies that as fast (gfx908, the MI100,
    does so at half the rate). On a CPU bfloat16 where it has instructions for it (AMX, AVX512-BF16), else the model's
    own.
    """
    if device.type == "cuda":
        slow_bfloat16 = str(environment(device)["capability"]).startswith("gfx908")
        return torch.bfloat16 if own == torch.bfloat16 and not slow_bfloat16 else torch.float16
    cpu = torch.cpu
    has = [getattr(cpu, f"_is_{name}_supported", lambda: False)() for name in ("amx_tile", "avx512_bf16")]
    return torch.bfloat16 if any(has) and onednn.available(torch.bfloat16) else own


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
