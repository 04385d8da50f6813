"""Compare a plan with the model it was made from, and find where they part if they do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.planning.build import trace_simplified
from depthfuse.acceleration.planning.graph import value_name
from depthfuse.acceleration.planning.parts import CallByCall, cast, first_inputs, parts_of, tensors_in
from depthfuse.acceleration.planning.plan import Entry, Plan
from depthfuse.errors import AccelerationError

# Largest allowed max |plan - model| / max |model| by the coarser of the two dtypes. Rounding alone gives
# about eps * sqrt(operations in a row): 1e-6 in float32 for the nets of the zoo; these leave two orders of
# magnitude.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max |result - reference| / max |reference|, in float64; inf for another shape or kind of dtype.

    Where the reference is NaN or infinite the result has to be the same, or the error is inf. Integers and booleans are
    compared as such.
    """
    result, reference = result.detach(), reference.detach()
    if result.shape != reference.shape or result.is_complex() != reference.is_complex():
        return float("inf")
    if result.is_complex():
        result, reference = (torch.view_as_real(x.resolve_conj()) for x in (result, reference))
    if reference.numel() == 0:
        return 0.0
    if not result.is_floating_point() and not reference.is_floating_point():
        result, reference = result.long(), reference.long()  # float64 would not tell large ones apart
        return ((result - reference).abs().max() / reference.abs().max().clamp_min(1)).item()
    result, reference = result.double(), reference.double()
    finite = reference.isfinite()
    if not torch.equal(result.isfinite(), finite):
        return float("inf")
    if not torch.allclose(result[~finite], reference[~finite], equal_nan=True):
        return float("inf")
    difference = (result - reference)[finite].abs()
    if difference.numel() == 0:
        return 0.0
    largest = reference[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return (difference.max() / largest).item()


def verify(plan: Plan, run: Callable[..., Any], model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest relative error over the outputs.

    Args:
        run: what the caller will call in the end.
        model: what the plan was made from. inputs: for the model.

    Raises:
        AccelerationError: it is beyond TOLERANCE, and of what the model's own rounding explains; the error names the
            first operation of which that is true.
    """
    dtype = plan.dtype
    with torch.no_grad():
        # On copies: some models write over their input.
        expected = tensors_in(model(*(x.clone() for x in inputs)))
        given = tensors_in(run(*(x.clone() for x in inputs)))
    if len(expected) != len(given):
        raise AccelerationError(f"the plan gives {len(given)} outputs, the model {len(expected)}")
    tolerance = max(TOLERANCE[dtype], *(TOLERANCE[x.dtype] for x in inputs if x.dtype in TOLERANCE))
    error = max((relative_error(g, e) for g, e in zip(given, expected, strict=True)), default=0.0)
    entries: tuple[Entry, ...] = ()
    if not all(e.any() for e in expected):
        # A head whose weights start at zero hides everything before it: look behind it.
        entries = compare_operations(plan, model, inputs)
        error = max([error, *(e.error for e in entries if e.error is not None)])
    if error <= tolerance or (not entries and _is_rounding_of_the_model(plan, model, inputs, given)):
        return error
    entries = entries or compare_operations(plan, model, inputs)
    wrong = next((e for e in entries if (e.error or 0.0) > tolerance), None)
    where = "each operation by itself is within that"
    if wrong is not None:
        where = f"first wrong operation: {wrong.path}, relative error {wrong.error:.1e}"
    raise AccelerationError(
        f"the accelerated model differs from the model by {error:.1e} (relative to the largest output; "
        f"allowed {tolerance:.0e} in {dtype}); {where}"
    )


def _is_rounding_of_the_model(
    plan: Plan, model: nn.Module, inputs: tuple[Tensor, ...], given: list[Tensor]
) -> bool:
    """Whether the outputs given are about as close to those of the model in float64 as the model's own are.

    Some nets amplify rounding: two correct ways to compute them then differ by more than TOLERANCE. The model's own are
    those in its dtype, and in the plan's where that is another, which rounds more coarsely. An error that is no number
    explains nothing.
    """
    exact = _outputs_in(torch.float64, model, inputs)
    dtypes = {plan.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    runs = [_outputs_in(dtype, model, inputs) for dtype in dtypes]
    if exact is None or any(own is None for own in runs):
        return False
    own_error = max(
        (relative_error(y, y64) for own in runs for y, y64 in zip(own or [], exact, strict=True)), default=0.0
    )
    error = max((relative_error(g, y64) for g, y64 in zip(given, exact, strict=True)), default=0.0)
    return math.isfinite(own_error) and error <= 4 * own_error


def _outputs_in(dtype: torch.dtype, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor] | None:
    """The outputs of a copy of `model` in `dtype`; None for a model that computes in one dtype only."""
    try:
        twin = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            return tensors_in(twin(*(x.to(dtype) if x.is_floating_point() else x.clone() for x in inputs)))
    except (RuntimeError, TypeError):
        return None


def compare_operations(plan: Plan, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Entry, ...]:
    """The plan's entries with the error of each operation's output, as far as the model has the same value somewhere.

    Each graph of the plan and what it was traced from see what they see in a run of the whole, so that errors of
    earlier operations go on into later ones.

    Args:
        model: what the plan was made from, or a copy of it in another dtype to compare with.
        inputs: for the model; they are cast for the plan.
    """
    entries = plan.named_entries()
    layers = dict(model.named_modules())
    parts = parts_of(plan.module)
    theirs = first_inputs(model, {name: layers[name] for name in parts}, cast(inputs, model))
    ours = first_inputs(plan.module, parts, plan.cast(inputs))
    errors: dict[tuple[str, str], float] = {}
    with torch.no_grad():
        for part in parts.keys() & theirs.keys() & ours.keys():
            wanted = {entry.nodes[-1] for entry in entries if entry.part == part and entry.nodes}
            expected: dict[str, Tensor] = {}

            def keep(node, args, kwargs, call, wanted=wanted, expected=expected):
                value = call()
                if node.name in wanted and isinstance(value, Tensor):
                    expected[node.name] = value.clone()  # the next one may write over it
                return value

            def compare(node, args, kwargs, call, part=part, expected=expected):
                value, name = call(), value_name(node)
                if name in expected and isinstance(value, Tensor):
                    errors[part, name] = relative_error(value, expected[name])
                return value

            CallByCall(trace_simplified(layers[part]), keep).run(*theirs[part])
            CallByCall(parts[part], compare).run(*ours[part])
    return tuple(replace(e, error=errors.get((e.part, e.nodes[-1])) if e.nodes else None) for e in entries)
