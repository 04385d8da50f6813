"""Compare a plan with the model it was made from, and find where they part if they do."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.planning.graph import value_name
from depthfuse.acceleration.planning.own import cast_main, main_dtype, own_copy
from depthfuse.acceleration.planning.parts import CallByCall, parts_given, parts_of, programs_given
from depthfuse.acceleration.planning.plan import Entry, Plan
from depthfuse.acceleration.planning.program import Call, CaptureError
from depthfuse.acceleration.planning.trees import flatten, in_words
from depthfuse.errors import AccelerationError
from depthfuse.measuring.accuracy import TOLERANCE, relative_error

logger = logging.getLogger(__name__)


def verify(plan: Plan, run: Callable[..., Any], model: nn.Module, call: Call) -> float:
    """The largest relative error over the outputs, for the call itself and for another one (see `other_call`).

    Args:
        run: what the caller will call in the end. model: what the plan was made from, or a copy of it; neither may keep
            state. call: as the model takes it.

    Raises:
        AccelerationError: an error is beyond TOLERANCE, and of what the model's own rounding explains; the message
            names the first operation of which that is true. Or containers, shapes or dtypes differ.
    """
    return max(_verify_one(plan, run, model, each) for each in (call, *other_call(plan, model, call)))


def other_call(plan: Plan, model: nn.Module, call: Call) -> list[Call]:
    """A call with other values, and another batch where the plan takes any; [] where the model takes no such call.

    Values are those of `call` in another order, which the model can be given as well; where all are equal, noise.
    """
    size = call.tensors[0].shape[0] if call.tensors and call.tensors[0].dim() else 0
    for change in (1, 0) if size else (0,):
        other = Call(tuple(other_values(x, size if change else None) for x in call.tensors), call.tree)
        if plan.form is None or plan.form.takes(plan.cast(other)):
            try:
                args, kwargs = other.on_clones().arguments()
                with torch.no_grad():
                    model(*args, **kwargs)
            except Exception as error:  # the model's own code may refuse values with any error
                logger.debug("not verified on another input, which the model refuses: %s", error)
                continue
            return [other]
    return []


def other_values(x: Tensor, batch: int | None = None) -> Tensor:
    """The values of `x` in another order, with one more in its first axis where that has the size `batch`."""
    if x.numel() == 0 or x.dim() == 0:
        return x
    if x.is_floating_point() and bool((x == x.flatten()[0]).all()):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
        x = x + noise
    for axis in range(x.dim()):
        x = x.roll(1, axis)
    if x.dim() > 1:
        x = x.flip(-1)
    return torch.cat([x, x[:1].roll(1, -1)]) if x.shape[0] == batch else x


def _verify_one(plan: Plan, run: Callable[..., Any], model: nn.Module, call: Call) -> float:
    with torch.no_grad():
        args, kwargs = call.on_clones().arguments()
        expected, expected_tree = flatten(model(*args, **kwargs), once=True)
        args, kwargs = call.on_clones().arguments()
        given, given_tree = flatten(run(*args, **kwargs), once=True)
    if given_tree != expected_tree:
        raise AccelerationError(
            f"the plan gives {in_words(given_tree, given)}, the model {in_words(expected_tree, expected)}"
        )
    main = main_dtype(model)
    for g, e in zip(given, expected, strict=True):
        if g.dtype != (plan.dtype if e.dtype == main else e.dtype):
            raise AccelerationError(f"the plan gives an output in {g.dtype}, the model in {e.dtype}")
    floats = [x.dtype for x in (*call.tensors, *expected) if x.dtype in TOLERANCE]
    tolerance = max(TOLERANCE[dtype] for dtype in (plan.dtype, *floats))
    error = max((relative_error(g, e) for g, e in zip(given, expected, strict=True)), default=0.0)
    entries: tuple[Entry, ...] = ()
    if not all(e.any() for e in expected):
        # A head whose weights start at zero hides everything before it: look behind it.
        entries = _compared(plan, model, call)
        error = max([error, *(e.error for e in entries if e.error is not None)])
    if error <= tolerance or (not entries and _is_rounding_of_the_model(plan, model, call, given)):
        return error
    entries = entries or _compared(plan, model, call)
    wrong = next((e for e in entries if (e.error or 0.0) > tolerance), None)
    where = "each operation by itself is within that"
    if wrong is not None:
        where = f"first wrong operation: {wrong.path}, relative error {wrong.error:.1e}"
    raise AccelerationError(
        f"the accelerated model differs from the model by {error:.1e} (relative to the largest output; "
        f"allowed {tolerance:.0e} in {plan.dtype}); {where}"
    )


def _compared(plan: Plan, model: nn.Module, call: Call) -> tuple[Entry, ...]:
    """As `compare_operations`; without any error where the model cannot be looked into."""
    try:
        return compare_operations(plan, model, call)
    except (CaptureError, KeyError) as error:
        logger.debug("operations are not compared: %s", error)
        return plan.named_entries()


def _is_rounding_of_the_model(plan: Plan, model: nn.Module, call: Call, given: list[Tensor]) -> bool:
    """Whether the outputs given are about as close to those of the model in float64 as the model's own are.

    Some nets amplify rounding: two correct ways to compute them then differ by more than TOLERANCE. The model's own are
    those in its dtype, and in the plan's where that is another, which rounds more coarsely. An error that is no number
    explains nothing.
    """
    exact = _outputs_in(torch.float64, model, call)
    runs = [_outputs_in(dtype, model, call) for dtype in {plan.dtype, main_dtype(model)} if dtype]
    if exact is None or any(own is None or len(own) != len(exact) for own in runs):
        return False
    own_error = max(
        (relative_error(y, y64) for own in runs for y, y64 in zip(own or [], exact, strict=True)), default=0.0
    )
    error = max((relative_error(g, y64) for g, y64 in zip(given, exact, strict=True)), default=0.0)
    return math.isfinite(own_error) and error <= 4 * own_error


def in_dtype(model: nn.Module, call: Call, dtype: torch.dtype) -> tuple[nn.Module, Call]:
    """A copy of a model in another dtype, in the place of its main one, and a call for it."""
    main = main_dtype(model)
    tensors = tuple(x.to(dtype) if x.dtype == main else x.clone() for x in call.tensors)
    return cast_main(own_copy(model), dtype), Call(tensors, call.tree)


def _outputs_in(dtype: torch.dtype, model: nn.Module, call: Call) -> list[Tensor] | None:
    """The outputs of a copy of `model` in `dtype`; None for a model that computes in one dtype only."""
    try:
        twin, cast = in_dtype(model, call, dtype)
        args, kwargs = cast.arguments()
        with torch.no_grad():
            return flatten(twin(*args, **kwargs), once=True)[0]
    except (RuntimeError, TypeError):
        return None


def compare_operations(plan: Plan, model: nn.Module, call: Call) -> tuple[Entry, ...]:
    """The plan's entries with the error of each operation's output, as far as the model has the same value somewhere.

    Each graph of the plan and what it was captured from see what they see in a run of the whole, so that errors of
    earlier operations go on into later ones.

    Args:
        model: what the plan was made from, or a copy of it in another dtype to compare with.
        call: for the model; it is cast for the plan.

    Raises:
        CaptureError: the model cannot be captured again, as one that computes in one dtype only.
    """
    entries = plan.named_entries()
    ours = parts_given(plan, plan.cast(call))
    theirs = programs_given(model, parts_of(plan.module), call, plan.is_dynamic)
    errors: dict[tuple[str, str], float] = {}
    with torch.no_grad():
        for part in theirs.keys() & ours.keys():
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

            CallByCall(theirs[part].graph, keep).run(*theirs[part].clones())
            CallByCall(ours[part].graph, compare).run(*ours[part].clones())
    return tuple(replace(e, error=errors.get((e.part, e.nodes[-1])) if e.nodes else None) for e in entries)
