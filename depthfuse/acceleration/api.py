"""`accelerate`: give a model, get one that computes the same, faster, and cannot be trained."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.checking.repeatable import check_repeatable
from depthfuse.acceleration.checking.report import Report
from depthfuse.acceleration.checking.verify import compare_operations, in_dtype
from depthfuse.acceleration.checking.verify import verify as verify_plan
from depthfuse.acceleration.model import AcceleratedModel
from depthfuse.acceleration.planning.build import build_plan
from depthfuse.acceleration.planning.own import cast_main, main_dtype, own_copy
from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.planning.signature import signature_of
from depthfuse.acceleration.running.choose import choose, fingerprint, restore
from depthfuse.acceleration.running.execution import Execution, Executor
from depthfuse.acceleration.running.implementations import TUNE
from depthfuse.acceleration.running.other_engines import OTHER_ENGINES, chosen_engines
from depthfuse.acceleration.saving.saved import read_plan
from depthfuse.devices import capability_of
from depthfuse.errors import AccelerationError, CheckpointError, DepthfuseError
from depthfuse.measured_cache import MeasuredCache, environment
from depthfuse.measuring.timing import time_interleaved
from depthfuse.merging.model_inputs import check_one_device, known_input_size
from depthfuse.merging.tracing import one_at_a_time
from depthfuse.ops import onednn, resolve_backend
from depthfuse.untrusted import MALFORMED, is_out_of_memory

logger = logging.getLogger(__name__)

_WORTH_COARSER = 1.05  # a dtype of fewer digits has to be faster by this


def accelerate(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    verify: bool | str = True,
    tune: str = "measure",
    *,
    example_kwargs: dict[str, Any] | None = None,
    dynamic: bool = True,
    engines: str | Sequence[str] = "auto",
    exact: bool = False,
) -> AcceleratedModel:
    """Replace convolution and linear chains by fused modules and check that nothing else changed.

    Args:
        model: any module in evaluation mode; best a merged or plain timm model. It is left alone.
        example_inputs: the arguments of an example call by position, or the one tensor that the model takes. Default,
            where there are no `example_kwargs` either: noise of the input size that the model's `pretrained_cfg` gives,
            batch 1. Packed weights suit its sizes best and are right for any.
        dtype: float32, float16, bfloat16 or float64 for the result, in the place of the model's main dtype, which is
            the default; tensors of other dtypes keep theirs. "auto": what is fast where the model is, on a CPU by
            measurement; see `fast_dtypes`.
        backend: "auto", "triton" or "reference", see `depthfuse.ops.resolve_backend`.
        verify: True compares outputs with the model's on the example and on other values, in another batch where that
            is open; "blocks" also gives the error of every operation against a float64 copy of the model, in the
            report; False does neither.
        tune: "measure" runs the implementations of every distinct shape on this machine and takes the fastest (one
            to a few seconds, kept for the next time in `cache_folder()`), then compares the whole with the model: where
            that is faster, a copy of it runs. "heuristic" takes the usual best without running any. "off" leaves the
            fused modules to the plain ops.
        example_kwargs: the arguments of the example call by name.
        dynamic: plan for all sizes at once that the model leaves open, such as the batch and the image. False plans for
            those of the example, in a third of the time: the model itself runs the first call of other ones.
        engines: whose engines besides ours are candidates for the whole of a float32 model on a CPU, where
            `tune="measure"` compares them: "auto" OpenVINO and ONNX Runtime where they are installed (with onnxscript;
            some seconds more, once), "own" none, or names out of "openvino", "onnxruntime", "executorch",
            "torch.compile" and "zentorch" (AMD's, for EPYC), of which the last two take a minute. What wins
            runs calls of the example's shapes, with as many threads. An engine asked for by name that does not run the
            model, or is not tried, is a warning with the reason.
        exact: True rules out Winograd's algorithm, whose rounding errors are some times those of a sum, and with it
            engines that are not ours, whose algorithms are their own affair.

    Several threads may call this; they wait for each other. Other threads may run models meanwhile, but not this one.

    Returns:
        An AcceleratedModel, which is called as the model is; `print(result.report())` shows what was fused.

    Raises:
        AccelerationError: the model is in training mode or on several devices, it does not take the example, no input
            size is known, it keeps state between calls or draws random numbers, the outputs differ (the first wrong
            operation is named), or an engine asked for by name is not installed.
        TypeError: arguments that the model's `forward` does not have.
        ValueError: an unknown `tune`, `verify`, `backend` or engine.
        depthfuse.ops.BackendError: a backend asked for by name cannot run here.
    """
    with one_at_a_time:  # and measuring wants to be alone
        return _accelerate(
            model, example_inputs, dtype, backend, verify, tune, example_kwargs, dynamic, engines, exact
        )


def _accelerate(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None,
    dtype: torch.dtype | str | None,
    backend: str,
    verify: bool | str,
    tune: str,
    example_kwargs: dict[str, Any] | None,
    dynamic: bool,
    engines: str | Sequence[str],
    exact: bool,
) -> AcceleratedModel:
    training = next((name or "the model itself" for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise AccelerationError(f"the model is in training mode ({training}): call model.eval() first")
    main = main_dtype(model)
    if main is None:
        raise AccelerationError(f"{type(model).__name__} has no weights: there is nothing to accelerate")
    check_one_device(model, AccelerationError, needs_values=True)
    device = next(t.device for t in [*model.parameters(), *model.buffers()] if t.dtype == main)
    dtypes = fast_dtypes(main, device) if dtype == "auto" else (dtype or main,)
    if not set(dtypes) <= {torch.float32, torch.float16, torch.bfloat16, torch.float64}:
        raise AccelerationError(f"dtype is {dtype}, expected float32, float16, bfloat16, float64 or 'auto'")
    _check_tune(tune)
    if verify not in (True, False, "blocks"):
        raise ValueError(f"verify is {verify!r}, expected True, False or 'blocks'")
    resolve_backend(backend, device)
    others = chosen_engines(engines)
    if example_inputs is None:
        example_inputs = () if example_kwargs else default_input(model, main, device)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    call = Call.of(*signature_of(model).bind(args, example_kwargs or {}))
    elsewhere = next((x.device for x in call.tensors if x.device != device), None)
    if elsewhere is not None:
        raise AccelerationError(f"the example input is on {elsewhere}, expected the model's {device}")
    reference = own_copy(model)
    check_repeatable(reference, own_copy(model), call)
    measured = tune == "measure" and all(x.numel() > 0 for x in call.tensors)
    if not measured:
        dtypes = dtypes[:1]
    makes = [_make(reference, call, each, backend, tune, dynamic, others, exact) for each in dtypes]
    fast = makes[0] if len(makes) == 1 else _fastest(makes, call)
    if engines not in ("auto", "own"):
        _warn_of_unused(others, fast.execution, fast.report().executor)
    error, entries = None, fast.report().entries
    if verify:
        error = verify_plan(fast.made, fast, reference, call)
        if fast.runs_the_model:  # what is saved is the plan, and it takes over when that is moved
            alone = functools.partial(_run_alone, fast.made)
            error = max(error, verify_plan(fast.made, alone, reference, call))
    if verify == "blocks":
        entries = compare_operations(fast.made, *in_dtype(reference, call, torch.float64))
    return fast.verified(error, entries)


def load_accelerated(
    path: str | Path,
    device: torch.device | str = "cpu",
    tune: str = "measure",
    engines: str | Sequence[str] = "auto",
) -> AcceleratedModel:
    """Load what `AcceleratedModel.save` wrote; the model it was made from is not needed.

    Args:
        path: the file. device: where it shall run.
        tune: as for `depthfuse.accelerate`, where what was chosen when it was saved does not hold: on another device,
            with other threads or versions, or without the engine that ran it. There is no model here to compare the
            whole plan with.
        engines: as for `depthfuse.accelerate`, then.

    Raises:
        CheckpointError: a file that is missing, damaged, or was written by another version.
        ValueError: an unknown `tune` or engine.
    """
    _check_tune(tune)
    others = chosen_engines(engines)
    with one_at_a_time:
        return _load(path, device, tune, others, engines not in ("auto", "own"))


def _load(
    path: str | Path,
    device: torch.device | str,
    tune: str,
    engines: Sequence[str],
    named: bool,
) -> AcceleratedModel:
    saved = read_plan(path)
    plan = replace(saved.plan, module=saved.plan.module.to(device))
    call = plan.example_call()
    here = environment(plan.device)
    same = here == saved.environment
    if not same:
        changed = [name for name in here if here[name] != saved.environment.get(name)]
        logger.info("tuning anew: another %s than where the model was saved", ", ".join(changed))
    other = OTHER_ENGINES.get(saved.execution.compiled or "")
    if other is not None and other.missing():
        logger.warning("%s, which ran this model, is not installed: tuning anew", saved.execution.compiled)
        same = False
    try:  # the first time that what the file holds is run
        if same:
            executor = restore(plan, saved.execution, call, saved.implementations)
        else:
            executor = choose(plan, None, call, tune, engines=engines, exact=saved.execution.exact)
            if named:
                _warn_of_unused(engines, executor.execution, executor.in_words())
    except DepthfuseError:
        raise
    except MALFORMED as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} holds no plan that this version understands ({error}): save it again with this version"
        ) from error
    report = replace(
        _report(plan, executor),
        max_relative_error=saved.report.max_relative_error,
        entries=tuple(
            replace(now, error=then.error)
            for now, then in zip(plan.named_entries(), saved.report.entries, strict=True)
        ),
    )
    return AcceleratedModel(plan, executor, report)


def _report(plan: Plan, executor: Executor) -> Report:
    return Report(
        model=plan.model,
        dtype=str(plan.dtype).removeprefix("torch."),
        device=str(plan.device),
        entries=plan.named_entries(),
        executor=executor.in_words(),
        max_relative_error=None,
        whole=executor.whole,
        engines=executor.execution.engines,
        latency_ms=executor.execution.latency_ms,
        ratios=executor.execution.ratios,
    )


def _warn_of_unused(engines: Sequence[str], execution: Execution, runs: str) -> None:
    """Of engines that the caller named: nobody should take another's speed for theirs."""
    for name in engines:
        why = execution.failed.get(name)
        if why is not None:
            logger.warning("%s does not run this model: %s. What runs: %s", name, why, runs)
        elif name not in execution.engines:
            logger.warning(
                "%s is not tried: it would be for float32 on a CPU, a model that is captured as a whole, "
                "tune='measure' and exact=False. What runs: %s",
                name,
                runs,
            )


def _check_tune(tune: str) -> None:
    if tune not in TUNE:
        raise ValueError(f"tune is {tune!r}, expected one of {', '.join(map(repr, TUNE))}")


def _make(
    reference: nn.Module,
    call: Call,
    dtype: torch.dtype,
    backend: str,
    tune: str,
    dynamic: bool,
    engines: Sequence[str],
    exact: bool,
) -> AcceleratedModel:
    """In one dtype, not verified yet."""
    main = main_dtype(reference)
    own = reference if dtype == main else cast_main(own_copy(reference), dtype)
    tensors = tuple(x.to(dtype) if x.dtype == main else x for x in call.tensors)
    plan = build_plan(own, reference, replace(call, tensors=tensors), backend, dynamic)

    def finish(executor: Executor) -> AcceleratedModel:
        return AcceleratedModel(plan, executor, _report(plan, executor), own, backend)

    return finish(choose(plan, reference, plan.cast(call), tune, finish, engines, exact))


def _run_alone(plan: Plan, *args: Any, **kwargs: Any) -> Any:
    call = plan.cast(Call.of(*plan.signature.bind(args, kwargs)))
    return Executor(plan)(call)


def _fastest(makes: list[AcceleratedModel], call: Call) -> AcceleratedModel:
    """Of one model in several dtypes the fastest by measurement; the first where none is clearly faster."""
    own = makes[0]
    names = [str(fast.dtype) for fast in makes]
    question = {
        "dtypes": names,
        "plan": fingerprint(own.plan),
        "inputs": [[list(x.shape), str(x.dtype)] for x in call.tensors],
        "call": str(call),
    }
    cache = MeasuredCache.of(own.device)
    answer = cache.get(question)
    if answer is None or answer.get("winner") not in names:
        args, kwargs = call.on_clones().arguments()  # a model may write over them
        runs = {
            name: functools.partial(fast, *args, **kwargs) for name, fast in zip(names, makes, strict=True)
        }
        timings = time_interleaved(runs, rounds=9, min_round_ms=20.0, warmup=1, device=own.device)
        speedups = {name: timings[name].speedup_over(timings[names[0]]) for name in names}
        best = max(speedups, key=speedups.__getitem__)
        answer = {"winner": best if speedups[best] > _WORTH_COARSER else names[0], "speedups": speedups}
        cache.put(question, answer)
    return makes[names.index(answer["winner"])]


def fast_dtypes(own: torch.dtype, device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that `dtype="auto"` chooses from; without measurement it is the first.

    On a GPU float16, unless the model is in bfloat16 already and the card multiplies that as fast (gfx908, the MI100,
    does so at half the rate). On a CPU the model's own, and bfloat16 where oneDNN computes in it: instructions for it
    say little, as on processors without AMX it can be the slower one.
    """
    if device.type == "cuda":
        slow_bfloat16 = capability_of(device).startswith("gfx908")
        return (torch.bfloat16 if own == torch.bfloat16 and not slow_bfloat16 else torch.float16,)
    coarser = (torch.bfloat16,) if own == torch.float32 and onednn.available(torch.bfloat16) else ()
    return own, *coarser


def default_input(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Noise [1, C, H, W] of the input size that a model names. Raises AccelerationError for one that names none."""
    size = known_input_size(model)
    if size is None:
        raise AccelerationError(
            f"{type(model).__name__} has no pretrained_cfg with an input_size: pass example_inputs, for "
            "instance torch.randn(1, 3, 224, 224)"
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *size, generator=generator).to(device, dtype)
