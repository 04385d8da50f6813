"""Which backend runs an op: "triton" (our kernels) or "reference" (PyTorch; on CPU, oneDNN's fused ops)."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from depthfuse.errors import BackendError
from depthfuse.ops.trust import refusal_of

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "reference")
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_logged: set[tuple[str, str]] = set()


@functools.cache
def _amd_architecture(device: torch.device) -> str:
    """ "gfx942", ... of a ROCm device."""
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


def _stood_in() -> bool:
    """Whether something runs kernels in the place of a GPU. It has imported them then; nothing is imported here."""
    launch = sys.modules.get("depthfuse.kernels.launch")
    return launch is not None and launch.is_stood_in()


def _why_not_triton(device: torch.device) -> str | None:
    """The reason why the Triton kernels cannot run on `device`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        arch = _amd_architecture(device) if torch.version.hip else ""
        # RDNA: gfx10xx, gfx11xx, gfx12xx; CDNA are gfx9xx.
        if re.match(r"gfx1\d", arch):
            return f"{arch} runs waves of 32 lanes, and the Triton kernels are laid out for AMD's 64 (gfx9)"
        return None
    if device.type == "cpu" and (os.environ.get("TRITON_INTERPRET") == "1" or _stood_in()):
        return None
    return f"the Triton kernels need a CUDA or ROCm device, and the device is {device}"


def resolve_backend(backend: str, device: torch.device | str) -> tuple[str, str]:
    """Choose the backend for `device`.

    Args:
        backend: "auto", "triton" or "reference". "auto" takes Triton on a GPU where it is installed, else the
            reference, and logs the reason once.
        device: where the tensors live.

    Returns:
        (name, reason): "triton" or "reference", and why in words.

    Raises:
        ValueError: an unknown backend name.
        BackendError: a backend asked for by name that cannot run, with the reason.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return "reference", "asked for by name"
    missing = _why_not_triton(device)
    if backend == "triton":
        if missing:
            raise BackendError(
                f"backend 'triton' cannot run: {missing}; pass backend='auto' or 'reference', or set "
                "TRITON_INTERPRET=1 before the start to debug the kernels on a CPU"
            )
        return "triton", "asked for by name"
    if device.type == "cuda" and missing is None:
        return "triton", f"Triton kernels on {device}"
    reason = (
        missing or "Triton's interpreter is for debugging: it runs only where backend='triton' asks for it"
    )
    if (device.type, reason) not in _logged:
        _logged.add((device.type, reason))
        logger.info("depthfuse ops on %s use the PyTorch reference: %s", device, reason)
    return "reference", reason


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Why no kernel takes tensors of `dtype`, or None."""
    return None if dtype in _KERNEL_DTYPES else f"dtype {dtype} (expected float16, bfloat16 or float32)"


def product_refusal(dtype: torch.dtype) -> str | None:
    """Why no kernel with a matrix product in it takes tensors of `dtype`, or None. Only where there is Triton."""
    from depthfuse.kernels.launch import dot_refusal

    return dot_refusal(dtype)


def refused(op: str, what: str) -> BackendError:
    """The error of an op, or a module, that was to run by Triton and whose kernel does not take `what`."""
    return BackendError(f"{op}: backend 'triton' does not take {what}; pass backend='auto' or 'reference'")


def runs_triton(op: str, backend: str, x: Tensor, refusal: Callable[[], str | None]) -> bool:
    """Whether the op's Triton kernel runs on `x`, and not its reference.

    Args:
        refusal: what the kernel does not take of this call, its dtype apart, in words, or None. Called only where
            Triton runs.

    Raises:
        BackendError: Triton was asked for by name, and the kernel does not take the call. With "auto" the reference
            runs in its place, and the first time an op does so is logged. ValueError: an unknown backend.
    """
    if resolve_backend(backend, x.device)[0] == "reference":
        return False
    what = dtype_refusal(x.dtype) or refusal_of(op, x) or refusal()
    if what is None:
        return True
    if backend == "triton":
        raise refused(op, what)
    if (op, "refused") not in _logged:
        _logged.add((op, "refused"))
        logger.info("depthfuse::%s uses the PyTorch reference: its kernel does not take %s", op, what)
    return False
