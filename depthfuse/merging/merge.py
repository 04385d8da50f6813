"""Merge a pruned subnet into a plain shallower model, and prove on random input that nothing changed."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from dataclasses import dataclass, field

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning.graph import has_hooks
from depthfuse.acceleration.planning.trace import LayerTracer
from depthfuse.merging.algebra import norm_affine
from depthfuse.merging.merged_blocks import TokenBatchNorm
from depthfuse.merging.supernet import Supernet, SwitchBlock
from depthfuse.spec import SubnetSpec

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


def merge(
    subnet: Supernet, check_size: tuple[int, int, int] | None = None, tolerance: float = TOLERANCE
) -> nn.Module:
    """Replace every pruned block of `subnet` by its merged module and fold batch norms (`fold_batch_norms`).

    The result is a new model of the original class, in the original dtype and in eval mode, with `merge_report` (a
    `MergeReport`) attached; the input is left alone. Source: UPDP (arXiv 2401.06426), step 4; `algebra.py`.

    The merge checks itself on random images of `check_size` (C, H, W; default: the model's own input size) in float64
    and logs the largest error, border and interior apart. Raises MergeError for a subnet in training mode or at
    lambda > 0, and where an error exceeds `tolerance`.
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

    report = check(subnet, check_size or input_size(subnet.model), tolerance=tolerance)
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
def check(
    subnet: Supernet, size: tuple[int, int, int], images: int = 2, tolerance: float = TOLERANCE
) -> MergeReport:
    """Merge a float64 copy and compare it with the subnet, block by block and at the output.

    Raises MergeError where a relative error exceeds `tolerance` or is not a number.
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
    if not worst <= tolerance:
        bad = next((e for e in errors if not max(e.border, e.interior) <= tolerance), "the model's output")
        raise MergeError(
            f"merging changed the model by {worst:.1e} (allowed {tolerance:.0e}), first in {bad}"
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


class _NormTracer(LayerTracer):
    """Stops at every layer, so that a conv followed by a batch norm shows as two calls; passes through identities."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, nn.Identity) and not has_hooks(module):
            return False
        leaf = super().is_leaf_module(module, qualified_name)
        return leaf or isinstance(module, nn.BatchNorm2d) or not list(module.children())


@dataclass
class _Folding:
    """Batch norms on their way into the layers beside them: the weights stay in float64 until all are folded."""

    model: nn.Module
    exact: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # {path: (weight, bias)}
    norms: int = 0

    def pairs(self) -> list[tuple[str, nn.Module, str, nn.Module]]:
        """(path, layer, path, layer) of two layers, each called once, where the second alone reads the first's output.

        By the data flow, read by torch.fx; none where it cannot trace the model.
        """
        try:
            graph = _NormTracer().trace(self.model)
        except Exception as error:  # fx raises whatever the model's own code raises on a proxy
            log.warning("batch norms are left as they are: torch.fx cannot trace the model (%s)", error)
            return []
        modules = dict(self.model.named_modules())
        nodes = [node for node in graph.nodes if node.op == "call_module"]
        calls = Counter(node.target for node in nodes)
        found = []
        for node in nodes:
            before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
                continue
            if calls[node.target] == calls[before.target] == 1:
                found.append((before.target, modules[before.target], node.target, modules[node.target]))
        return found

    def read(self, path: str, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
        if path not in self.exact:
            weight = layer.weight.double()
            bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
            self.exact[path] = weight, bias
        return self.exact[path]

    def into_layers_before(self) -> None:
        """conv -> norm: diag(s) W, s b + t."""
        for path, conv, norm_path, norm in self.pairs():
            if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or norm.running_mean is None:
                continue
            if not isinstance(conv, nn.Conv2d):
                continue
            scale, shift = norm_affine(norm)
            weight, bias = self.read(path, conv)
            self.exact[path] = weight * scale[:, None, None, None], bias * scale + shift
            act = norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity().eval()
            self._remove(norm_path, act)

    def into_layers_behind(self) -> None:
        """norm -> unpadded conv or linear layer: W diag(s), b + W t."""
        for norm_path, norm, path, layer in self.pairs():
            kinds = type(norm), type(layer)
            if kinds not in ((nn.BatchNorm2d, nn.Conv2d), (TokenBatchNorm, nn.Linear)):
                continue
            # zeros beside the image are not what the norm would make of zeros
            padded = isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid")
            if norm.running_mean is None or padded or not _same_stage(norm_path, path):
                continue
            scale, shift = norm_affine(norm)
            weight, bias = self.read(path, layer)
            groups = getattr(layer, "groups", 1)
            # [O, I / groups, ...] times [I]: the inputs of each output channel's own group
            inputs = [
                v.view(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
                for v in (scale, shift)
            ]
            scale, shift = (v.reshape(*v.shape, *[1] * (weight.ndim - 2)) for v in inputs)
            self.exact[path] = weight * scale, bias + (weight * shift).flatten(1).sum(1)
            self._remove(norm_path, nn.Identity().eval())

    def _remove(self, norm_path: str, successor: nn.Module) -> None:
        self.model.set_submodule(norm_path, successor)
        self.norms += 1

    def write(self) -> None:
        for path, (weight, bias) in self.exact.items():
            layer = self.model.get_submodule(path)
            dtype = layer.weight.dtype
            layer.weight, layer.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))


def _same_stage(norm_path: str, path: str) -> bool:
    """Whether a layer lies in the same row of blocks as a norm, or in the module that holds the norm.

    What leaves a stage is an intermediate feature that others read from timm's models: it keeps its norm.
    """
    block = norm_path.rpartition(".")[0]
    stage = block.rpartition(".")[0]
    return not block or path.startswith(f"{block}.") or (stage != "" and path.startswith(f"{stage}."))


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> int:
    """Fold batch norms into the layers beside them, in place; returns how many.

    A norm goes into the convolution that it directly follows; else into the unpadded convolution or the linear layer
    that directly follows it, in the same stage. So two merged blocks in a row share no norm any more, where the second
    is 1x1 or linear; between them the model then has the values before the norm.

    Reads the data flow by torch.fx: two layers are a pair only where the output of the first goes nowhere else and both
    are called once. A model that fx cannot trace keeps its batch norms, which is said in the log. Computed in float64,
    cast once. Raises MergeError in training mode.
    """
    if model.training:
        raise MergeError("batch norms can be folded in eval mode only: call .eval() first")
    if not any(isinstance(m, nn.BatchNorm2d | TokenBatchNorm) for m in model.modules()):
        return 0
    folding = _Folding(model)
    folding.into_layers_before()
    folding.into_layers_behind()
    folding.write()
    return folding.norms
