"""Which kernels have failed on a device, and are not to be used there: PyTorch runs in their place.

A kernel fails when it cannot be compiled or launched for a shape, which is found in use, or when the self-test
(`depthfuse env --selftest`) finds that it computes something else, which is kept in the user's cache.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from depthfuse.measured_cache import MeasuredCache

logger = logging.getLogger(__name__)

# What the outcome of a self-test depends on.
_SOURCES = ("kernels", "ops", "selftest")
# {(op, dtype, device): {shape of the input, or None for all: reason}}
_failed: dict[tuple[str, torch.dtype, torch.device], dict[torch.Size | None, str]] = {}


def distrust(
    op: str, dtype: torch.dtype, device: torch.device, reason: str, shape: torch.Size | None = None
) -> None:
    """Let PyTorch run an op in a dtype on a device from now on, in this process: its kernel has failed there.

    Args:
        shape: of the input with which it failed; None where it is not to be used for any.
    """
    _failed.setdefault((op, dtype, device), {})[shape] = reason
    what = "" if shape is None else f" for {list(shape)}"
    logger.warning(
        "depthfuse::%s in %s on %s uses PyTorch%s: its kernel failed (%s)", op, dtype, device, what, reason
    )


def distrusted(op: str, dtype: torch.dtype, device: torch.device, shape: torch.Size | None) -> str | None:
    """Why the op's kernel is not to be used for an input of this shape, in words, or None."""
    if device.type == "cuda":
        _read_verdict(op, device)
    reasons = _failed.get((op, dtype, device))
    if not reasons:
        return None
    reason = reasons.get(None) or reasons.get(shape)
    return None if reason is None else f"{dtype} on {device}, where it failed ({reason})"


def refusal_of(op: str, x: Tensor) -> str | None:
    """As `distrusted`, for an input."""
    return distrusted(op, x.dtype, x.device, x.shape)


def keep_verdict(op: str, device: torch.device, failed: Mapping[torch.dtype, str]) -> None:
    """Keep what a self-test has found of an op, {dtype: reason} where it failed, and act on it."""
    answer = {"failed": {str(dtype): reason for dtype, reason in failed.items()}}
    MeasuredCache.of(device, _SOURCES).put(_question(op), answer)
    for key in [key for key in _failed if key[0] == op and key[2] == device]:
        _failed[key].pop(None, None)
    for dtype, reason in failed.items():
        distrust(op, dtype, device, reason)


@functools.cache  # once a process
def _read_verdict(op: str, device: torch.device) -> None:
    answer = MeasuredCache.of(device, _SOURCES).get(_question(op)) or {}
    failed = answer.get("failed")
    for name, reason in (failed if isinstance(failed, dict) else {}).items():
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            distrust(op, dtype, device, f"in the self-test: {reason}")


def _question(op: str) -> dict[str, str]:
    return {"self-test of": op}
