"""Fit the merged blocks of a supernet to its original blocks: minutes, a few hundred images, no labels, no gradients.

`fit_candidates` fits every candidate alone, for the search to choose from; `fit_chosen` fits those that were chosen one
after another, each on what the net pruned so far really gives it, so that errors do not pile up. Precedents for
transformers: ReplaceMe (arXiv 2505.02819), TOAST (arXiv 2410.04941).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from depthfuse.errors import FitError
from depthfuse.fitting.blocks import fit_block
from depthfuse.fitting.fitted import Fitted
from depthfuse.fitting.kept import fit_kept, settle_kept
from depthfuse.fitting.recording import Call, record
from depthfuse.log import progress
from depthfuse.merging.computed_weights import has_computed, private_copy
from depthfuse.merging.supernet import Supernet, SwitchBlock
from depthfuse.spec import KEEP

log = logging.getLogger(__name__)


def fit_candidates(
    supernet: Supernet, images: Sequence[Tensor], options: Mapping[str, Sequence[str]] | None = None
) -> dict[str, dict[str, float]]:
    """Fit every candidate of a supernet `with_fitted`, in place, to its block in the original net.

    Args:
        images: batches [N, C, H, W] on the supernet's device; two at least, a few hundred images.
        options: {block: candidates}; all of them by default. What is left out, and what cannot be fitted, stays as it
            was merged.

    Returns {block: {candidate: the share of the output's variance that is left as error}}. Raises FitError, naming the
    block, where its inputs or outputs are not finite.
    """
    options = supernet.options() if options is None else options
    lost: dict[str, dict[str, float]] = {}
    _prepare(supernet)
    with progress("fit", total=sum(map(len, options.values()))) as bar:
        for path, names in options.items():
            supernet.set_choices({})
            calls = record(supernet.model, path, images)
            lost[path] = {}
            for name in names:
                share = _fit(supernet.blocks[path], name, calls, calls)
                if share is not None:
                    lost[path][name] = share
                bar.advance()
    return lost


def fit_chosen(supernet: Supernet, images: Sequence[Tensor], kept: bool = True) -> dict[str, float]:
    """Fit the chosen candidates, in place, in the order in which the net runs them, each on what the net pruned so far
    gives; see `fit_candidates`.

    kept: fit the last layers of the kept blocks after the first of them, too. They then are no longer right where the
    blocks before them are not pruned (lambda 1).
    """
    chosen = {path: name for path, name in supernet.choices().items() if name != KEEP}
    lost: dict[str, float] = {}
    _prepare(supernet)
    original = private_copy(supernet)  # before its kept blocks change
    original.set_choices({})
    so_far: dict[str, str] = {}
    with progress("fit", total=len(supernet.blocks)) as bar:
        for path, block in supernet.blocks.items():
            if path in chosen or so_far:
                wanted = record(original.model, path, images)
                supernet.set_choices(so_far)
                given = record(supernet.model, path, images[: len(wanted)])
                wanted = wanted[: len(given)]
                if path in chosen:
                    share = _fit(block, chosen[path], given, wanted)
                    if share is not None:
                        lost[path] = share
                    so_far[path] = chosen[path]
                elif kept and not has_computed(block.block) and not _shares(supernet, block):
                    try:
                        settle_kept(block.block, original.blocks[path].block, given, wanted)
                        fit_kept(block.block, given, wanted)
                    except FitError as error:
                        raise FitError(f"block {path}: {error}") from error
            bar.advance()
    supernet.set_choices(chosen)
    return lost


def _shares(supernet: Supernet, block: SwitchBlock) -> bool:
    """Whether a block has a weight that another block reads, too."""
    own = set(block.block.parameters())
    return any(
        not own.isdisjoint(other.block.parameters())
        for other in supernet.blocks.values()
        if other is not block
    )


def _prepare(supernet: Supernet) -> None:
    if not all(
        isinstance(c, Fitted) for block in supernet.blocks.values() for c in block.candidates.values()
    ):
        raise FitError("the candidates share their weights with the original blocks: call with_fitted first")
    supernet.eval()


def _fit(block: SwitchBlock, name: str, given: Sequence[Call], wanted: Sequence[Call]) -> float | None:
    candidate = block.candidates[name]
    assert isinstance(candidate, Fitted)
    kept = {key: value.clone() for key, value in candidate.state_dict().items()}
    try:
        return fit_block(candidate.merged, given, wanted)
    except FitError as error:
        candidate.load_state_dict(kept)
        if not all(bool(torch.isfinite(call.output).all()) for call in [*given, *wanted]):
            raise FitError(f"block {block.path}: {error}") from error
        log.warning("%s=%s stays as it was merged: %s", block.path, name, error)
        return None
