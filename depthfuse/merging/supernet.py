"""The supernet: every prunable block with a switch between original and pruned, over shared weights (UPDP, fig. 2)."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from depthfuse.errors import SpecError
from depthfuse.merging.adapters import BlockInfo, find_blocks
from depthfuse.merging.adapters.base import Lambda, fixed, mix
from depthfuse.merging.adapters.rows import gather
from depthfuse.merging.computed_weights import (
    compute_weights,
    copies_of_computed,
    has_computed,
    plain_type,
    private_copy,
    refresh,
)
from depthfuse.merging.merged_blocks import first_of, with_first
from depthfuse.merging.model_inputs import check_one_device
from depthfuse.merging.tracing import alone
from depthfuse.spec import KEEP, ModelSource, SubnetSpec

Mixing = Literal["op", "block", "norm", "random"]


class SwitchBlock(nn.Module):
    """One prunable block: the original, its merge candidates, and which of them is on at which lambda.

    choice: "keep" or the name of a candidate. lam: a number in [0, 1], or a 0-dim float tensor, a learned gate: then
    both sides are computed at 0 and 1 too, for its gradient. The gate stays its owner's: it is no parameter here.
    mixing: what lies between original (1) and pruned (0).

    - op: every operation mixes on its own; the candidate says how.
    - block: lam * original(x) + (1 - lam) * pruned(x).
    - norm: LayerNorm turns into batch norm with lambda, all else is pruned at once (SLAB, Guo et al., ICML 2024). A
      block without LayerNorms then is pruned at every lambda.
    - random: in training, each pass takes the original with probability lambda, else the pruned block (progressive
      replacing: Xu et al., BERT-of-Theseus, EMNLP 2020). Evaluation mixes as "op".
    """

    def __init__(self, block: nn.Module, info: BlockInfo):
        super().__init__()
        self.block = block
        self.candidates = nn.ModuleDict({c.name: c(block) for c in info.candidates})
        self.path = info.path
        self.choice = KEEP
        self.lam: Lambda = 0.0
        self.mixing: Mixing = "op"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lam":  # past nn.Module, which would register somebody else's parameter here
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:  # an attention mask, which candidates know by its name
            # of the class: who traces the model puts something else in the place of the block's own
            names = list(inspect.signature(plain_type(self.block).forward).parameters)[2 : 2 + len(args)]
            kwargs |= dict(zip(names, args, strict=True))
        if self.choice == KEEP:
            return self.block(x, **kwargs)
        candidate, lam = self.candidates[self.choice], self.lam
        refresh(self)  # candidates read the weights of layers that they do not call
        if self.mixing == "random" and self.training and not isinstance(lam, Tensor):
            lam = float(torch.rand(()).item() < lam)
        if self.mixing == "norm":
            norms = {"norm_lam": lam} if candidate.layer_norms else {}
            return candidate(self.block, x, 0.0, **norms, **kwargs)
        if fixed(lam, 1.0):
            return self.block(x, **kwargs)
        if self.mixing in ("op", "random") or fixed(lam, 0.0):
            return candidate(self.block, x, lam, **kwargs)
        original, pruned = self.block(x, **kwargs), candidate(self.block, x, 0.0, **kwargs)
        return with_first(original, mix(lam, first_of(original), first_of(pruned)))

    def fuse(self) -> nn.Module:
        """timm's contract (`timm.models.reparameterize_model`): the merged block, or the original where it is kept.

        Raises SpecError in training mode and at lambda > 0, where merging would change the function.
        """
        if self.choice == KEEP:
            return self.block
        if self.training:
            raise SpecError(f"block {self.path} is in training mode: call .eval() before merging")
        if self.lam != 0.0:
            raise SpecError(
                f"block {self.path} is at lambda = {self.lam:g}: only a block at lambda = 0 can be merged"
            )
        own = self
        if has_computed(self):
            own = private_copy(self)
            compute_weights(own)
        return own.candidates[own.choice].merge(own.block).eval()


class Supernet(nn.Module):
    """A copy of a model whose prunable blocks carry switches. The model given is left alone.

    With every block at "keep" the output equals the model's bit for bit. `set_choices` selects a subnet; `sample` draws
    one. After search, `Supernet(...).subnet(spec)` keeps only the chosen switches, for progressive training.

    Two ablations: without `separate_norms` kept and pruned blocks share weights and biases of their batch norms (their
    statistics stay apart); without `border_remedy` pruned blocks pad with zeros between convolutions, and what is
    merged then differs at the border.

    Layers may compute their weights (pruning, weight and spectral norm, parametrisations): such weights stay so until
    the subnet is merged. A block with a forward hook inside is not prunable. A model that holds a timm model, at any
    depth, is taken like one.

    Raises SpecError where the model has no prunable block (the message lists the reasons) or lies on several devices.
    MergeError: the model cannot be copied.
    """

    @alone
    def __init__(self, model: nn.Module, separate_norms: bool = True, border_remedy: bool = True):
        super().__init__()
        check_one_device(model)
        self.source = ModelSource.of(model)
        infos = find_blocks(model)
        prunable = [info for info in infos if info.candidates]
        if not prunable:
            reasons = sorted({f"{info.block_type}: {info.reason}" for info in infos}) or [
                "no block of a known type"
            ]
            raise SpecError(f"{self.source.name} has no block that can be pruned ({'; '.join(reasons)})")
        self.model = private_copy(model)
        # a spectral norm takes a step whenever its weight is read in training mode
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        refresh(self.model)
        for info in prunable:
            if info.length > 1:
                gather(self.model, info.path, info.length)
            parent, _, name = info.path.rpartition(".")
            parent_module = self.model.get_submodule(parent)
            switch = SwitchBlock(getattr(parent_module, name), info)
            setattr(parent_module, name, switch)
            for candidate in switch.candidates.values():
                if not separate_norms:
                    candidate.share_norms(switch.block)
                if not border_remedy:
                    candidate.drop_border_remedy()
        for module, training in modes.items():
            module.training = training

    def __deepcopy__(self, memo: dict[int, Any]) -> Supernet:
        memo.update(copies_of_computed(self))
        replica = self.__new__(type(self))
        memo[id(self)] = replica
        replica.__dict__ = copy.deepcopy(self.__dict__, memo)
        return replica

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, classes]
        return self.model(x)

    @property
    def blocks(self) -> dict[str, SwitchBlock]:
        """{block path in the original model: its switch}, in order."""
        return {m.path: m for m in self.model.modules() if isinstance(m, SwitchBlock)}

    def options(self) -> dict[str, list[str]]:
        """{block path: names of its candidates}."""
        return {path: list(block.candidates) for path, block in self.blocks.items()}

    def forms(self) -> dict[str, dict[str, str]]:
        """{block path: {candidate: its form}}, see `Candidate.form`."""
        return {path: {n: c.form for n, c in b.candidates.items()} for path, b in self.blocks.items()}

    def choices(self) -> dict[str, str]:
        """{block path: what is on now}."""
        return {path: block.choice for path, block in self.blocks.items()}

    def spec(self) -> SubnetSpec:
        """The current choices as a spec."""
        return SubnetSpec.from_mapping(self.source, self.choices())

    def set_choices(self, choices: Mapping[str, str] | SubnetSpec, lam: float = 0.0) -> None:
        """Switch the named blocks to their candidates at `lam`, all others to "keep".

        Raises SpecError for a block or candidate that the model does not have, and then changes nothing.
        """
        chosen = choices.mapping() if isinstance(choices, SubnetSpec) else dict(choices)
        blocks = self.blocks
        unknown = [path for path in chosen if path not in blocks]
        if unknown:
            raise SpecError(
                f"no prunable block {', '.join(unknown[:5])}; this model has {', '.join(blocks)} ({self.source.name})"
            )
        for path, name in chosen.items():
            if name != KEEP and name not in blocks[path].candidates:
                known = ", ".join([KEEP, *blocks[path].candidates])
                raise SpecError(f"block {path} has no candidate {name!r}; known: {known}")
        if not 0.0 <= lam <= 1.0:
            raise SpecError(f"lambda must be between 0 and 1, not {lam}")
        for path, block in blocks.items():
            block.choice, block.lam = chosen.get(path, KEEP), lam

    def set_lambda(self, lam: float) -> None:
        """Move the chosen blocks along the path from original (1) to pruned (0)."""
        self.set_choices(self.choices(), lam)

    def set_mixing(self, mixing: Mixing) -> None:
        """What lies between original and pruned block, see `SwitchBlock`. Raises SpecError for an unknown one."""
        if mixing not in get_args(Mixing):
            raise SpecError(f"unknown mixing {mixing!r}; known: {', '.join(get_args(Mixing))}")
        for block in self.blocks.values():
            block.mixing = mixing

    def sample(
        self, rng: random.Random, options: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, str]:
        """Draw a random subnet: each block kept with probability 1/2, else one of its candidates."""
        options = options or self.options()
        return {
            path: rng.choice(names) if names and rng.random() < 0.5 else KEEP
            for path, names in options.items()
        }

    @alone
    def subnet(self, spec: SubnetSpec, lam: float = 0.0) -> Supernet:
        """A copy that holds switches for the chosen blocks only, each with its one candidate."""
        if spec.source.name != self.source.name:
            raise SpecError(
                f"the spec is for {spec.source.name!r}, this supernet was made of {self.source.name!r}"
            )
        self.set_choices(spec)
        net = copy.deepcopy(self)
        for path, block in net.blocks.items():
            if block.choice == KEEP:
                net.model.set_submodule(path, block.block)
            else:
                block.candidates = nn.ModuleDict({block.choice: block.candidates[block.choice]})
        net.set_choices(spec, lam)
        return net


def batch_norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """All batch norms with running statistics, by name."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


@contextmanager
def _estimating(model: nn.Module) -> Iterator[None]:
    """Batch norms in training mode with a cumulative average, everything else (drop path, dropout) in eval mode."""
    modes = {module: module.training for module in model.modules()}
    norms = [norm for _, norm in batch_norms(model)]
    momenta = [norm.momentum for norm in norms]
    saved = [{key: value.clone() for key, value in norm.named_buffers()} for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum, old in zip(norms, momenta, saved, strict=True):
            norm.momentum = momentum
            if int(norm.num_batches_tracked) == 0:  # not on the active path: keep what it had
                for key, value in norm.named_buffers():
                    value.copy_(old[key])
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate the running statistics of all active batch norms, in place, as cumulative averages over `batches`.

    batches: images [N, C, H, W] on the model's device. A supernet shares weights among subnets whose statistics
    differ, so a subnet must be re-calibrated before it is scored (US-Nets, Yu & Huang, ICCV 2019, sec. 3.3). Raises
    ValueError for no batches at all.
    """
    seen = 0
    with _estimating(model):
        for images in batches:
            model(images)
            seen += 1
    if not seen:
        raise ValueError("re-calibration needs at least one batch of images, got none")
