"""Compare a plan with the model it was made from, and find where they part if they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from depthfuse.accelerate.build import trace_simplified
from depthfuse.accelerate.errors import AccelerationError
from depthfuse.accelerate.graph import value_name
from depthfuse.accelerate.model import AcceleratedModel
from depthfuse.accelerate.report import Entry

# Largest allowed max |plan - model| / max |model| by the coarser of the two dtypes. Rounding alone gives
# about eps * sqrt(operations in a row): 1e-6 in float32 for the nets of the zoo; these leave two orders of
# magnitude.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max |result - reference| / max |reference|, in float64; inf where one is NaN and the other is not."""
    result, reference = result.detach().double(), reference.detach().double()
    if result.shape != reference.shape:
        return float("inf")
    if reference.numel() == 0:
        return 0.0
    if not torch.equal(result.isfinite(), reference.isfinite()):
        return float("inf")
    difference = torch.nan_to_num(result - reference, nan=0.0, posinf=0.0, neginf=0.0).abs().max()
    largest = torch.nan_to_num(reference, nan=0.0, posinf=0.0, neginf=0.0).abs().max()
    return (difference / largest.clamp_min(torch.finfo(torch.float64).tiny)).item()


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def verify(accelerated: AcceleratedModel, model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest relative error over the outputs.

    Raises:
        AccelerationError: it is beyond TOLERANCE; the error names the first operation of which that is true.
    """
    dtype = accelerated.dtype
    with torch.no_grad():
        # On copies: some models write over their input.
        expected = _tensors(model(*(x.clone() for x in inputs)))
        given = _tensors(accelerated(*(x.clone() for x in inputs)))
    if len(expected) != len(given):
        raise AccelerationError(f"the plan gives {len(given)} outputs, the model {len(expected)}")
    tolerance = max(TOLERANCE[dtype], *(TOLERANCE[x.dtype] for x in inputs if x.dtype in TOLERANCE))
    error = max((relative_error(g, e) for g, e in zip(given, expected, strict=True)), default=0.0)
    entries: tuple[Entry, ...] = ()
    if not all(e.any() for e in expected):
        # A head whose weights start at zero hides everything before it: look behind it.
        entries = compare_operations(accelerated, model, inputs)
        error = max([error, *(e.error for e in entries if e.error is not None)])
    if error <= tolerance:
        return error
    entries = entries or compare_operations(accelerated, model, inputs)
    wrong = next((e for e in entries if (e.error or 0.0) > tolerance), None)
    where = "each operation by itself is within that"
    if wrong is not None:
        where = f"first wrong operation: {wrong.path}, relative error {wrong.error:.1e}"
    raise AccelerationError(
        f"the accelerated model differs from the model by {error:.1e} (relative to the largest output; "
        f"allowed {tolerance:.0e} in {dtype}); {where}"
    )


def compare_operations(
    accelerated: AcceleratedModel, model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Entry, ...]:
    """The plan's entries with the error of each operation's output, as far as the model has the same value somewhere.

    Each graph of the plan and what it was traced from see what they see in a run of the whole, so that errors of
    earlier operations go on into later ones.

    Args:
        model: what the plan was made from, or a copy of it in another dtype to compare with.
        inputs: for the model; they are cast for the plan.
    """
    entries = accelerated.report().entries
    dtype = next(p.dtype for p in [*model.parameters(), *model.buffers()] if p.is_floating_point())
    layers = dict(model.named_modules())
    parts = {name: m for name, m in accelerated.plan.named_modules() if isinstance(m, fx.GraphModule)}
    theirs = _first_inputs(model, {name: layers[name] for name in parts}, _cast(inputs, dtype))
    ours = _first_inputs(accelerated.plan, parts, _cast(inputs, accelerated.dtype))
    errors: dict[tuple[str, str], float] = {}
    with torch.no_grad():
        for part in parts.keys() & theirs.keys() & ours.keys():
            wanted = {entry.nodes[-1] for entry in entries if entry.part == part and entry.nodes}
            expected: dict[str, Tensor] = {}
            _Visit(trace_simplified(layers[part]), expected.__setitem__).run(*theirs[part])

            def compare(name: str, value: Tensor, part=part, wanted=wanted, expected=expected) -> None:
                if name in wanted and name in expected:
                    errors[part, name] = relative_error(value, expected[name])

            _Visit(parts[part], compare).run(*ours[part])
    return tuple(replace(e, error=errors.get((e.part, e.nodes[-1])) if e.nodes else None) for e in entries)


def _cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype, copy=True) if x.is_floating_point() else x.clone() for x in inputs)


def _first_inputs(
    model: nn.Module, parts: dict[str, nn.Module], inputs: tuple[Tensor, ...]
) -> dict[str, tuple[Tensor, ...]]:
    """What each of `parts` is given at its first call when the model runs."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def keep(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, tuple(x.clone() for x in args))  # it may write over them

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in parts.items()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Visit(fx.Interpreter):
    """Runs a graph and hands each tensor on, with the name of the node of the traced model that has this value."""

    def __init__(self, graph: fx.GraphModule, visit: Callable[[str, Tensor], None]) -> None:
        super().__init__(graph)
        self._visit = visit

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            self._visit(value_name(node), value.clone())  # the next one may write over it
        return value
