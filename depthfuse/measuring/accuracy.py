"""How far a result is from what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest allowed max |result - reference| / max |reference| by the coarser of the two dtypes. Rounding alone gives
# about eps * sqrt(operations in a row): 1e-6 in float32 for the nets of the zoo; these leave two orders of
# magnitude.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """max |result - reference| / max |reference|, in float64; inf for another shape or kind of dtype.

    Where the reference is NaN or infinite the result has to be the same, or the error is inf. Integers and booleans are
    compared as such.
    """
    result, reference = result.detach(), reference.detach()
    if result.shape != reference.shape or result.is_complex() != reference.is_complex():
        return float("inf")
    if result.is_complex():
        result, reference = (torch.view_as_real(x.resolve_conj()) for x in (result, reference))
    if reference.numel() == 0:
        return 0.0
    if not result.is_floating_point() and not reference.is_floating_point():
        result, reference = result.long(), reference.long()  # float64 would not tell large ones apart
        return ((result - reference).abs().max() / reference.abs().max().clamp_min(1)).item()
    result, reference = result.double(), reference.double()
    finite = reference.isfinite()
    if not torch.equal(result.isfinite(), finite):
        return float("inf")
    if not torch.allclose(result[~finite], reference[~finite], equal_nan=True):
        return float("inf")
    difference = (result - reference)[finite].abs()
    if difference.numel() == 0:
        return 0.0
    largest = reference[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return (difference.max() / largest).item()
