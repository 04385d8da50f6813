"""Compare what a file computes in its runtime with the model in float64, on other values and in other sizes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.checking.verify import in_dtype, other_values
from depthfuse.acceleration.planning.own import main_dtype
from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.planning.trees import flatten
from depthfuse.acceleration.running.conversion import Run
from depthfuse.errors import ExportError
from depthfuse.exporting.programs import reason_of
from depthfuse.exporting.subject import NONE, SIZES, Subject
from depthfuse.measuring.accuracy import relative_error
from depthfuse.untrusted import is_out_of_memory

logger = logging.getLogger(__name__)

# What a right runtime's rounding may exceed the model's own by. Other orders of summation give the same in size;
# Winograd's convolutions, and polynomials in the place of exp and erf, some times as much.
_MARGIN = 16


@dataclass(frozen=True)
class Comparison:
    """error, allowed: relative to the largest output in float64, the worst over `shapes`, those of the calls' first
    inputs.
    """

    error: float
    allowed: float
    shapes: tuple[tuple[int, ...], ...]


def compare(
    subject: Subject,
    load: Callable[[Path], Run],
    path: Path,
    calls: Sequence[Call],
    operations: int,
    runtime: str,
) -> Comparison:
    """Run a file on calls unlike the example, those of `other_calls`.

    Rounding errors of n operations in a row that are each right to eps add up to about eps * sqrt(n). What the model
    itself shows in its dtype, on the same calls, may be more, as where a net amplifies them. The file may differ from
    the model in float64 by `_MARGIN` times the larger of both.

    Args:
        load: from the file to what takes the inputs' tensors and gives the outputs'. operations: of the program.

    Raises:
        ExportError: it does not run, or differs by more.
    """
    eps = torch.finfo(main_dtype(subject.model) or torch.float32).eps
    allowed = _MARGIN * eps * math.sqrt(operations)
    worst, shapes = 0.0, []
    run = _tried(runtime, "load the file", load, path)
    for call in calls:
        own = _outputs(subject.model, call)
        exact = _exact(subject.model, call) or own
        given = _tried(runtime, f"run the file on {call}", run, *(x.contiguous() for x in call.tensors))
        found, wanted = ([(y.dtype, tuple(y.shape)) for y in ys] for ys in (given, own))
        if found != wanted:
            raise ExportError(f"{runtime} gives {found} on {call}, where {subject.name()} gives {wanted}")
        allowed = max(allowed, _MARGIN * _worst(own, exact))
        error = _worst(given, exact)
        shapes.append(tuple(call.tensors[0].shape))
        if not error <= allowed:
            raise ExportError(
                f"{runtime} gives something else than {subject.name()} on {call}: it is off by {error:.1e} of the "
                f"largest output, where rounding explains {allowed:.1e}"
            )
        worst = max(worst, error)
        if not any(y.any() for y in exact):
            logger.warning("all outputs are zero, which shows nothing: is %s trained?", subject.name())
    return Comparison(worst, allowed, tuple(shapes))


def _tried(runtime: str, what: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:  # whatever another project raises
        if is_out_of_memory(error):
            raise
        raise ExportError(
            f"{runtime} cannot {what}: {reason_of(error)}; with check=False the file is written unseen"
        ) from error


def other_calls(subject: Subject, largest_batch: int | None) -> list[Call]:
    """Calls that the file has to take: other values, one image more and a single one, and other sizes of images.

    Raises ExportError where the model itself takes none of another batch that is said to be open.
    """
    call, form = subject.call, subject.plan.form
    assert form is not None
    other = replace(call, tensors=tuple(other_values(x) for x in call.tensors))
    if subject.dynamic == NONE:
        return [other]
    batch = call.tensors[0].shape[0]
    more = batch + 1 if largest_batch is None else min(batch + 1, largest_batch)
    calls = [_of_batch(other, subject, size) for size in dict.fromkeys((more, 1))]
    if subject.dynamic == SIZES:
        wider = [_of_size(calls[0], *by) for by in ((32, 64), (16, 32), (8, 16))]
        calls += [call for call in wider if form.takes(call)][:1]
    refused = next((call for call in calls if not form.takes(call)), None)
    if refused is not None:
        raise ExportError(
            f"{subject.name()} does not take {refused} as it takes the example: export with dynamic='none', for the "
            "example's sizes alone"
        )
    return calls


def _of_batch(call: Call, subject: Subject, batch: int) -> Call:
    """With so many images: those of `call`, the first of them again behind the last."""

    def of(x: Tensor, axes: dict[int, str]) -> Tensor:
        return torch.cat([x, x.roll(1, -1)])[:batch] if axes.get(0) == "batch" else x

    return replace(call, tensors=tuple(map(of, call.tensors, subject.open_axes())))


def _of_size(call: Call, height: int, width: int) -> Call:
    """With images that are so much larger, filled up with their own values."""

    def of(x: Tensor) -> Tensor:
        if x.dim() != 4:
            return x
        rows = torch.arange(x.shape[2] + height) % x.shape[2]
        columns = torch.arange(x.shape[3] + width) % x.shape[3]
        return x[:, :, rows][..., columns]

    return replace(call, tensors=tuple(map(of, call.tensors)))


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    args, kwargs = call.on_clones().arguments()
    with torch.no_grad():
        return flatten(model(*args, **kwargs), once=True)[0]


def _exact(model: nn.Module, call: Call) -> list[Tensor] | None:
    """In float64; None for a model that computes in one dtype only."""
    try:
        return _outputs(*in_dtype(model, call, torch.float64))
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        logger.debug("compared in the model's own dtype: %s", error)
        return None


def _worst(given: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error over the outputs."""
    return max((relative_error(g.cpu(), e.cpu()) for g, e in zip(given, exact, strict=True)), default=0.0)
