"""Fold batch norms into the layers beside them, where the data flow says that nothing else reads what lies between."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

from depthfuse.errors import MergeError
from depthfuse.merging.algebra import norm_affine
from depthfuse.merging.merged_blocks import TokenBatchNorm
from depthfuse.merging.tracing import LayerTracer, alone, has_hooks

log = logging.getLogger(__name__)


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

        By the data flow, read by torch.fx; none where it cannot trace the model, or where no norm is left in it.
        """
        if not any(isinstance(module, nn.BatchNorm2d | TokenBatchNorm) for module in self.model.modules()):
            return []
        try:
            graph = _NormTracer().trace(self.model)
        except Exception as error:  # fx raises whatever the model's own code raises on a proxy
            log.warning("batch norms are left as they are: torch.fx cannot trace the model (%s)", error)
            return []
        modules = dict(self.model.named_modules())
        nodes = [node for node in graph.nodes if node.op == "call_module"]
        calls = Counter(node.target for node in nodes)
        # who reads a weight past its layer, or watches a layer by a hook, would see that it was folded
        seen = {n.target.rpartition(".")[0] for n in graph.nodes if n.op == "get_attr" and n.users}
        seen |= {path for path in calls if has_hooks(modules[path])}
        found = []
        for node in nodes:
            before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
                continue
            if calls[node.target] == calls[before.target] == 1 and not seen & {node.target, before.target}:
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


@alone
@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> int:
    """Fold batch norms into the layers beside them, in place; returns how many.

    A norm goes into the convolution that it directly follows; else into the unpadded convolution or the linear layer
    that directly follows it, in the same stage. So two merged blocks in a row share no norm any more, where the second
    is 1x1 or linear; between them the model then has the values before the norm.

    Reads the data flow by torch.fx: two layers are a pair only where the output of the first goes nowhere else and both
    are called once. A model that fx cannot trace keeps its batch norms, which is said in the log. Computed in float64,
    cast once. Layers with hooks, parametrisations among them, stay as they are. Raises MergeError in training mode.
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
