"""Merge a pruned subnet into a plain shallower model, and prove on random input that nothing changed."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

from depthfuse.algebra import norm_affine
from depthfuse.spec import SubnetSpec
from depthfuse.supernet import Supernet, SwitchBlock

log = logging.getLogger(__name__)

TOLERANCE = 1e-10  # relative, float64


class MergeError(ValueError):
    """The subnet cannot be merged, or the merged model failed its check."""


@dataclass(frozen=True)
class BlockError:
    """Largest error of one merged block, relative to its largest output; in float64 on random input."""

    path: str
    candidate: str
    border: float
    interior: float


@dataclass(frozen=True)
class MergeReport:
    """What merging did: per-block errors, the error of the model's output, and how many batch norms were folded."""

    blocks: tuple[BlockError, ...]
    output: float
    folded_norms: int

    def __str__(self) -> str:
        border = max((b.border for b in self.blocks), default=0.0)
        interior = max((b.interior for b in self.blocks), default=0.0)
        return (
            f"merged {len(self.blocks)} blocks, folded {self.folded_norms} batch norms; largest relative error in "
            f"float64: border {border:.1e}, interior {interior:.1e}, model output {self.output:.1e}"
        )


def merge(subnet: Supernet, check_size: tuple[int, int, int] | None = None) -> nn.Module:
    """Replace every pruned block of `subnet` by its merged module and fold the remaining conv + BN pairs.

    The result is a new model of the original class, in the original dtype and in eval mode, with `merge_report` (a
    `MergeReport`) attached; the input is left alone. Source: UPDP (arXiv 2401.06426), step 4; `depthfuse.algebra`.

    The merge checks itself on random images of `check_size` (C, H, W; default: the model's own input size) in float64
    and logs the largest error, border and interior apart. Raises MergeError for a subnet in training mode or at
    lambda > 0, and where an error exceeds 1e-10.
    """
    if not isinstance(subnet, Supernet):
        raise MergeError(
            f"merge takes a depthfuse.Supernet with its choices set, not {type(subnet).__name__}"
        )
    if subnet.training:
        raise MergeError(
            "the subnet is in training mode: call .eval() first, or batch norms would change as you merge"
        )
    moving = [path for path, block in subnet.blocks.items() if block.choice != "keep" and block.lam != 0.0]
    if moving:
        raise MergeError(
            f"lambda is not 0 in {', '.join(moving)}: finish progressive training before merging"
        )

    report = check(subnet, check_size or input_size(subnet.model))
    merged = copy.deepcopy(subnet.model)
    _fuse_switches(merged)
    fold_batch_norms(merged)
    merged.depthfuse_source = subnet.source
    merged.merge_report = report
    log.info("%s", report)
    return merged


def _fuse_switches(model: nn.Module) -> None:
    for path, block in [(n, m) for n, m in model.named_modules() if isinstance(m, SwitchBlock)]:
        model.set_submodule(path, block.fuse())


def merged_structure(spec: SubnetSpec) -> nn.Module:
    """The merged model of a spec with arbitrary weights, in eval mode: what a merged state dict is loaded into.

    Raises SpecError for a spec that does not fit the model it names.
    """
    supernet = Supernet(spec.source.build()).eval()
    supernet.set_choices(spec)
    _fuse_switches(supernet.model)
    fold_batch_norms(supernet.model)
    supernet.model.depthfuse_source = spec.source
    return supernet.model


def fixed_image_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) that a model is bound to by its patch embedding or position table; None where it takes any size."""
    patch = getattr(model, "patch_embed", None)
    size = getattr(patch, "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that a timm model expects: its fixed size where it has one, else its pretrained_cfg's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    height, width = fixed_image_size(model) or (height, width)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (first.in_channels if first is not None else channels), height, width


@torch.no_grad()
def check(subnet: Supernet, size: tuple[int, int, int], images: int = 2) -> MergeReport:
    """Merge a float64 copy and compare it with the subnet, block by block and at the output.

    Raises MergeError where a relative error exceeds 1e-10 or is not a number.
    """
    device = next(subnet.parameters()).device
    reference = copy.deepcopy(subnet.model).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, *size, generator=generator, dtype=torch.float64).to(device)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    blocks = {
        path: m for path, m in reference.named_modules() if isinstance(m, SwitchBlock) and m.choice != "keep"
    }
    handles = [
        m.register_forward_hook(lambda _m, args, out, path=path: seen.update({path: (args[0], out)}))
        for path, m in blocks.items()
    ]
    expected = _outputs(reference(x))
    for handle in handles:
        handle.remove()

    errors = []
    for path, block in blocks.items():
        merged = block.fuse()
        given, wanted = seen.pop(path)
        border, interior = _split_error(merged(given), wanted, _reach(merged))
        errors.append(BlockError(path, block.choice, border, interior))
        reference.set_submodule(path, merged)
    folded = fold_batch_norms(reference)
    pairs = zip(_outputs(reference(x)), expected, strict=True)
    output = max(_split_error(got, wanted, 0)[1] for got, wanted in pairs)
    report = MergeReport(tuple(errors), output, folded)
    worst = max([output, *(max(e.border, e.interior) for e in errors)], key=lambda v: (v != v, v))
    if not worst <= TOLERANCE:
        bad = next((e for e in errors if not max(e.border, e.interior) <= TOLERANCE), "the model's output")
        raise MergeError(
            f"merging changed the model by {worst:.1e} (allowed {TOLERANCE:.0e}), first in {bad}"
        )
    return report


def _outputs(result: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Logits, or the maps of a model made with features_only=True."""
    return [result] if isinstance(result, Tensor) else list(result)


def _reach(module: nn.Module) -> int:
    """How many outer pixels of a merged block's output can see padding."""
    paddings = [m.padding[0] for m in module.modules() if isinstance(m, nn.Conv2d)]
    return max(paddings, default=0)


def _split_error(got: Tensor, wanted: Tensor, reach: int) -> tuple[float, float]:
    """(border, interior): largest |got - wanted| / largest |wanted|; token maps [B, N, D] have no border."""
    error = (got - wanted).abs() / wanted.abs().max().clamp_min(1e-300)
    if error.ndim != 4 or reach == 0:
        return 0.0, float(error.max())
    inner = torch.zeros_like(error, dtype=torch.bool)
    inner[:, :, reach:-reach, reach:-reach] = True
    interior = error[inner]
    return float(error[~inner].max()), float(interior.max()) if interior.numel() else 0.0


class _NormTracer(fx.Tracer):
    """Stops at every layer, so that a conv followed by a batch norm shows as two calls."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return (
            isinstance(m, nn.BatchNorm2d)
            or super().is_leaf_module(m, qualified_name)
            or not list(m.children())
        )


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> int:
    """Fold every batch norm that directly follows a convolution into it, in place; returns how many.

    Reads the data flow by torch.fx: a pair is folded only where the convolution's output goes nowhere else and both
    modules are called once. A model that fx cannot trace keeps its batch norms, which is said in the log. Computed in
    float64. Raises MergeError in training mode.
    """
    if model.training:
        raise MergeError("batch norms can be folded in eval mode only: call .eval() first")
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return 0
    try:
        graph = _NormTracer().trace(model)
    except Exception as error:  # fx raises whatever the model's own code raises on a proxy
        log.warning("conv + BN pairs are left as they are: torch.fx cannot trace the model (%s)", error)
        return 0
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    folded = 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        norm, conv = modules[node.target], modules[before.target]
        if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or norm.running_mean is None:
            continue
        if (
            not isinstance(conv, nn.Conv2d)
            or calls.count(node.target) != 1
            or calls.count(before.target) != 1
        ):
            continue
        scale, shift = norm_affine(norm)
        bias = torch.zeros_like(shift) if conv.bias is None else conv.bias.double()
        conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))
        conv.bias = nn.Parameter((bias * scale + shift).to(conv.weight.dtype))
        model.set_submodule(
            node.target, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity().eval()
        )
        folded += 1
    return folded
