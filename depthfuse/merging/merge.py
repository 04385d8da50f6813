"""Merge a pruned subnet into a plain shallower model, and prove on random input that nothing changed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.errors import CheckpointError, MergeError
from depthfuse.merging.computed_weights import compute_weights, in_float64, private_copy
from depthfuse.merging.folding import fold_batch_norms
from depthfuse.merging.merged_blocks import first_of
from depthfuse.merging.model_inputs import check_one_device, input_size
from depthfuse.merging.outputs import tensors_of
from depthfuse.merging.supernet import Supernet, SwitchBlock
from depthfuse.merging.tracing import alone
from depthfuse.shapes import ShapesOnly, bytes_of_source
from depthfuse.spec import SubnetSpec
from depthfuse.untrusted import is_out_of_memory

log = logging.getLogger(__name__)

LARGEST_ERROR = 1e-10  # relative, float64


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


@alone
def merge(
    subnet: Supernet, check_size: tuple[int, int, int] | None = None, tolerance: float = LARGEST_ERROR
) -> nn.Module:
    """Replace every pruned block of `subnet` by its merged module and fold batch norms (`fold_batch_norms`).

    The result is a new model of the original class, in the original dtype and in eval mode, with `merge_report` (a
    `MergeReport`) attached; the input is left alone. Weights that layers compute (pruning, weight and spectral norm,
    parametrisations) are plain parameters in it. Source: UPDP (arXiv 2401.06426), step 4; `algebra.py`.

    The merge checks itself on random images of `check_size` (C, H, W; default: the model's own input size) in float64
    and logs the largest error, border and interior apart. The model may return a tensor, or lists, tuples, dictionaries
    or dataclasses of tensors. Threads that merge or accelerate wait for each other.

    Raises MergeError for a subnet in training mode or at lambda > 0, a model that does not take such images or returns
    something else, and where an error exceeds `tolerance`.
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

    check_one_device(subnet, MergeError, needs_values=True)
    report = check(subnet, check_size or input_size(subnet.model), tolerance=tolerance)
    merged = private_copy(subnet.model)
    compute_weights(merged)
    fuse_switches(merged)
    fold_batch_norms(merged)
    merged.depthfuse_source = subnet.source
    merged.depthfuse_spec = subnet.spec()
    merged.merge_report = report
    log.info("%s", report)
    return merged


def fuse_switches(model: nn.Module) -> None:
    """Put the merged block, or the kept one, in the place of every switch of `model`."""
    for path, block in [(n, m) for n, m in model.named_modules() if isinstance(m, SwitchBlock)]:
        model.set_submodule(path, block.fuse())


@alone
def merged_structure(spec: SubnetSpec) -> nn.Module:
    """The merged model of a spec with arbitrary weights, in eval mode: what a merged state dict is loaded into.

    Raises SpecError for a spec that does not fit the model it names.
    """
    return _structure(spec, spec.source.build())


@alone
def load_merged(spec: SubnetSpec, tensors: Mapping[str, Tensor], where: str | Path) -> nn.Module:
    """The merged model of a spec with the weights of a merged state dict, in eval mode.

    Names and shapes are compared before anything is allocated: the spec may ask for any model.

    Raises SpecError for a spec that does not fit the model it names, CheckpointError, naming `where`, for tensors of
    another model.
    """
    with ShapesOnly():
        shapes = _structure(spec, spec.source.build_shapes()).state_dict()
    check_same_shapes(shapes, tensors, where, spec.source.name)
    model = _structure(spec, spec.source.build(at_most_bytes=bytes_of_source(tensors.values())))
    model.load_state_dict(dict(tensors))
    return model


def check_same_shapes(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str | Path, name: str = ""
) -> None:
    """Raise CheckpointError, naming `where` and the model, unless two state dicts have the same names and shapes."""
    faults = [f"lacks {name}" for name in wanted if name not in given]
    faults += [f"has {name} besides" for name in given if name not in wanted]
    faults += [
        f"{name} is {list(given[name].shape)} there, {list(wanted[name].shape)} in the model"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if faults:
        than = f" than {name}" if name else ""
        raise CheckpointError(f"{where} holds the weights of another model{than}: {', '.join(faults[:3])}")


def _structure(spec: SubnetSpec, model: nn.Module) -> nn.Module:
    supernet = Supernet(model).eval()
    supernet.set_choices(spec)
    fuse_switches(supernet.model)
    fold_batch_norms(supernet.model)
    supernet.model.depthfuse_source = spec.source
    supernet.model.depthfuse_spec = spec
    return supernet.model


@torch.no_grad()
def check(
    subnet: Supernet, size: tuple[int, int, int], images: int = 2, tolerance: float = LARGEST_ERROR
) -> MergeReport:
    """Merge a float64 copy and compare it with the subnet, block by block and at the output.

    Raises MergeError where a relative error exceeds `tolerance` or is not a number.
    """
    device = next(subnet.parameters()).device
    reference = in_float64(private_copy(subnet.model))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, *size, generator=generator, dtype=torch.float64).to(device)
    blocks = {
        path: m for path, m in reference.named_modules() if isinstance(m, SwitchBlock) and m.choice != "keep"
    }
    passes = _run_watched(reference, blocks, x)
    expected = tensors_of(passes.outputs)

    errors = []
    compute_weights(reference)
    for path, block in blocks.items():
        merged = block.fuse()
        if path in passes.blocks:  # a model may leave blocks out, where it is asked for early features only
            args, kwargs, wanted = passes.blocks.pop(path)
            border, interior = _split_error(first_of(merged(*args, **kwargs)), wanted, _reach(merged))
            errors.append(BlockError(path, block.choice, border, interior))
        reference.set_submodule(path, merged)
    folded = fold_batch_norms(reference)
    try:
        got = tensors_of(reference(x))
    except Exception as error:  # the model's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise MergeError(
            f"the merged model cannot run, where the subnet could ({type(error).__name__}: {error}): the model's own "
            f"code reads what its blocks are made of; leave such blocks of {', '.join(blocks)} at 'keep'"
        ) from error
    if list(got) != list(expected):
        raise MergeError(
            f"the merged model returns {_names(got)}, where the subnet returns {_names(expected)}: what it returns "
            f"depends on what its blocks are made of; leave such blocks of {', '.join(blocks)} at 'keep'"
        )
    outputs = {where: _split_error(got[where], wanted, 0)[1] for where, wanted in expected.items()}
    output = max(outputs.values(), key=_nan_last)
    report = MergeReport(tuple(errors), output, folded)
    worst = max([output, *(v for e in errors for v in (e.border, e.interior))], key=_nan_last)
    if not worst <= tolerance:
        bad = next((e for e in errors if not max(e.border, e.interior) <= tolerance), None)
        where = next(where for where, error in outputs.items() if error == output or error != error)
        place = f"the model's output {where}".rstrip()
        raise MergeError(
            f"merging changed the model by {worst:.1e} (allowed {tolerance:.0e}), first in {bad or place}"
        )
    return report


@dataclass
class _Pass:
    """One run of a model: what it returned, and {block path: (its arguments, keyword arguments, output)}."""

    outputs: Any
    blocks: dict[str, tuple[tuple, dict[str, Any], Tensor]]


def _run_watched(model: nn.Module, blocks: Mapping[str, nn.Module], x: Tensor) -> _Pass:
    """Run `model`, a copy of our own, on x. Raises MergeError where it does not take x."""
    given: dict[str, tuple[tuple, dict[str, Any]]] = {}
    seen: dict[str, tuple[tuple, dict[str, Any], Tensor]] = {}

    def before(path: str, _block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # copies, as a block may write over its input, and the next one over its output
        given[path] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args), kwargs

    def after(path: str, _block: nn.Module, _args: tuple, output: Any) -> None:
        seen[path] = (*given.pop(path), first_of(output).clone())

    handles = []
    for path, block in blocks.items():
        handles.append(block.register_forward_pre_hook(functools.partial(before, path), with_kwargs=True))
        handles.append(block.register_forward_hook(functools.partial(after, path)))
    try:
        outputs = model(x)
    except Exception as error:  # the model's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise MergeError(
            f"{type(model).__name__} does not take float64 images {list(x.shape)}, on which the merge is checked "
            f"({type(error).__name__}: {error}): pass check_size=(C, H, W), a size of images that it takes"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _Pass(outputs, seen)


def _names(outputs: Mapping[str, Tensor]) -> str:
    return ", ".join(where or "a tensor" for where in list(outputs)[:8])


def _nan_last(value: float) -> tuple[bool, float]:
    return value != value, value


def _reach(module: nn.Module) -> int:
    """How many outer pixels of a merged block's output can see padding."""
    paddings = [m.padding[0] for m in module.modules() if isinstance(m, nn.Conv2d)]
    return max(paddings, default=0)


def _split_error(got: Tensor, wanted: Tensor, reach: int) -> tuple[float, float]:
    """(border, interior): largest |got - wanted| / largest |wanted|; token maps [B, N, D] have no border.

    Infinite for another shape, and for integers that are not the same.
    """
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf"), float("inf")
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0, 0.0 if torch.equal(got, wanted) else float("inf")
    if not wanted.numel():
        return 0.0, 0.0
    size = wanted.abs()
    scale = size[size.isfinite()].amax().clamp_min(1e-300) if size.isfinite().any() else size.new_ones(())
    error = ((got - wanted).abs() / scale).masked_fill(got == wanted, 0.0)  # infinities too
    if error.ndim != 4 or reach == 0:
        return 0.0, float(error.max())
    inner = torch.zeros_like(error, dtype=torch.bool)
    inner[:, :, reach:-reach, reach:-reach] = True
    interior = error[inner]
    return float(error[~inner].max()), float(interior.max()) if interior.numel() else 0.0
