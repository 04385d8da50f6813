"""Compare a plan with the model it was made from, and find where they part if they do."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from depthfuse.accelerate.errors import AccelerationError

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


def verify(accelerated: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """The largest relative error over the outputs.

    Raises:
        AccelerationError: it is beyond TOLERANCE; the error names the layer after which the two differ most.
    """
    with torch.no_grad():
        expected, given = _tensors(model(*inputs)), _tensors(accelerated(*inputs))
    if len(expected) != len(given):
        raise AccelerationError(f"the plan gives {len(given)} outputs, the model {len(expected)}")
    error = max((relative_error(g, e) for g, e in zip(given, expected, strict=True)), default=0.0)
    tolerance = max(TOLERANCE[dtype], *(TOLERANCE[x.dtype] for x in inputs if x.dtype in TOLERANCE))
    if error <= tolerance:
        return error
    raise AccelerationError(
        f"the accelerated model differs from the model by {error:.1e} (relative to the largest output; "
        f"allowed {tolerance:.0e} in {dtype}); {_worst_layer(accelerated, model, inputs)}"
    )


def _worst_layer(accelerated: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """Which layer's output differs most, of those whose output exists in both."""
    ends = {
        (e.absorbed[-1] if e.absorbed else e.path): e.path for e in accelerated.report().entries if e.fused
    }
    expected: dict[str, Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if path in ends:

            def keep(_module, _inputs, output, path=path):
                expected[path] = output

            handles.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(accelerated.plan, fx.GraphModule):
        return "its children were planned one by one: accelerate them alone to find the layer"
    errors: dict[str, float] = {}
    by_name = dict(zip(_fused_names(accelerated.plan), ends, strict=False))

    class Compare(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            path = by_name.get(node.target) if node.op == "call_module" else None
            if path in expected and isinstance(value, Tensor) and value.shape == expected[path].shape:
                errors[path] = relative_error(value, expected[path])
            return value

    dtype = accelerated.dtype
    with torch.no_grad():
        Compare(accelerated.plan).run(*(x.to(dtype) for x in inputs))
    if not errors:
        return "no layer's output exists in both to compare"
    worst = max(errors, key=errors.__getitem__)
    return f"worst layer: {ends[worst]} (through {worst}), relative error {errors[worst]:.1e}"


def _fused_names(plan: fx.GraphModule) -> list[str]:
    return [n.target for n in plan.graph.nodes if n.op == "call_module" and n.target.startswith("fused_")]
