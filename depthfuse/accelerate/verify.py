"""Compare a plan with the model it was made from, and find where they part if they do."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from depthfuse.accelerate.errors import AccelerationError
from depthfuse.accelerate.model import AcceleratedModel

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
        AccelerationError: it is beyond TOLERANCE; the error names the layer whose output differs most.
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
    layers: dict[str, float] = {}
    if not all(e.any() for e in expected):
        # A head whose weights start at zero hides everything before it: look behind it.
        layers = layer_errors(accelerated, model, inputs)
        error = max([error, *layers.values()])
    if error <= tolerance:
        return error
    layers = layers or layer_errors(accelerated, model, inputs)
    where = "no layer's output exists in both to compare"
    if layers:
        worst = max(layers, key=layers.__getitem__)
        where = f"worst layer: {worst}, relative error {layers[worst]:.1e}"
    raise AccelerationError(
        f"the accelerated model differs from the model by {error:.1e} (relative to the largest output; "
        f"allowed {tolerance:.0e} in {dtype}); {where}"
    )


def layer_errors(
    accelerated: AcceleratedModel, model: nn.Module, inputs: tuple[Tensor, ...]
) -> dict[str, float]:
    """Relative error at each fused module whose output is some layer's output in the model too.

    Returns:
        {path of the fused convolution or linear layer: relative error}. Empty for a model whose children were planned
        one by one: its plan has no graph to look into.
    """
    if not isinstance(accelerated.plan, fx.GraphModule):
        return {}
    fused = {entry.name: entry for entry in accelerated.report().entries if entry.fused}
    ends = {name: entry.absorbed[-1] if entry.absorbed else entry.path for name, entry in fused.items()}
    expected: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(_module: nn.Module, _inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                expected.setdefault(path, output.clone())  # the next layer may write over it

        return hook

    layers = dict(model.named_modules())
    handles = [layers[path].register_forward_hook(keep(path)) for path in set(ends.values()) & set(layers)]
    try:
        with torch.no_grad():
            model(*(x.clone() for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    errors: dict[str, float] = {}

    class Compare(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            value = super().run_node(node)
            reference = expected.get(ends.get(node.target)) if node.op == "call_module" else None
            if isinstance(value, Tensor) and isinstance(reference, Tensor) and value.shape == reference.shape:
                errors[fused[node.target].path] = relative_error(value, reference)
            return value

    with torch.no_grad():
        Compare(accelerated.plan).run(*(x.to(accelerated.dtype, copy=True) for x in inputs))
    return errors
