"""Kernels of csrc/gpu, HIP and CUDA from one source: built for the device at hand, or for the CPU to test them there.

The inverted residual keeps its expanded tile in shared memory, which Triton cannot index: it expands each input 1.56
times where ours in Triton expands it 4 times. It has not run on a GPU yet, so `accelerate` does not offer it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from depthfuse.devices import capability_of
from depthfuse.kernels.arguments import NO_TAIL, Tail, ThreeLayers
from depthfuse.measured_cache import cache_folder
from depthfuse.native.library import CSRC, Missing, run_compiler
from depthfuse.native.plan import ACTIVATIONS

logger = logging.getLogger(__name__)

SOURCE = CSRC / "gpu" / "inverted_residual.cu"
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


def compiler_of(arch: str) -> list[str]:
    """The command that compiles `SOURCE` for "gfx908", "sm_90", ... or "cpu", the output's options apart.

    Raises Missing: that compiler is not here.
    """
    name = "hipcc" if arch.startswith("gfx") else "nvcc" if arch.startswith("sm_") else "g++"
    found = shutil.which(name)
    if found is None:
        raise Missing(f"there is no {name}, which {arch} needs")
    if name == "hipcc":
        return [found, "-x", "hip", "-std=c++17", "-O3", f"--offload-arch={arch}", "-fPIC"]
    if name == "nvcc":
        number = arch.removeprefix("sm_")
        return [
            found,
            "-std=c++17",
            "-O3",
            f"-gencode=arch=compute_{number},code=sm_{number}",
            "-Xcompiler=-fPIC",
        ]
    return [found, "-x", "c++", "-std=c++17", "-O2", "-fPIC"]


@functools.cache
def library_for(arch: str) -> ctypes.CDLL:
    """The kernels for an architecture, built once into the user's cache. Raises Missing."""
    folder = cache_folder()
    if folder is None:
        raise Missing("this user has no home to keep kernels in; set DEPTHFUSE_CACHE_DIR to a folder")
    command = compiler_of(arch)
    digest = hashlib.sha256(repr(command).encode())
    for source in sorted(SOURCE.parent.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    target = folder / "native" / digest.hexdigest()[:16] / f"libdepthfuse_{arch}.so"
    if not target.exists():
        logger.warning("building the native kernels for %s, once", arch)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch, target.name)
            run_compiler([*command, "-shared", str(SOURCE), "-o", str(made)], HIP_PLATFORM="amd")
            os.replace(made, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise Missing(f"the kernels for {arch} do not load: {error}") from error


def inverted_residual(
    x: Tensor,  # [N, C, H, W] channels_last
    weights: ThreeLayers,  # [hidden, C, 1, 1], [hidden], [hidden, 1, 3, 3], [hidden], [K, hidden, 1, 1], dense
    tail: Tail = NO_TAIL,  # residual [N, K, P, Q] channels_last
    *,
    stride: int = 1,
    act_inner: str = "relu6",
) -> Tensor:  # [N, K, P, Q] channels_last
    """`depthfuse.ops.inverted_residual` by the native kernel, in bfloat16, and in float16 on a GPU or float32 on a CPU.

    At most 64 channels in and out, at stride 2 at most 32 in. All tensors of one dtype, on one device.

    Raises:
        Missing: there is no compiler for the device. ValueError: a shape, layout or dtype that it does not take.
        RuntimeError: the driver's error, by its number.
    """
    n, c, h, w = x.shape
    hidden, k = weights.w1.shape[0], weights.w3.shape[0]
    size = [(extent - 1) // stride + 1 for extent in (h, w)] if stride in (1, 2) else [0, 0]
    y = x.new_empty((n, k, *size)).contiguous(memory_format=torch.channels_last)
    shapes = {
        "x": (x, (n, c, h, w)),
        "w1": (weights.w1, (hidden, c, 1, 1)),
        "b1": (weights.b1, (hidden,)),
        "w2": (weights.w2, (hidden, 1, 3, 3)),
        "b2": (weights.b2, (hidden,)),
        "w3": (weights.w3, (k, hidden, 1, 1)),
        "b3": (tail.bias, (k,)),
        "residual": (tail.residual, tuple(y.shape)),
        "scale": (tail.scale, (k,)),
        "shift": (tail.shift, (k,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        image = name in ("x", "residual")
        layout = torch.channels_last if image else torch.contiguous_format
        same = tensor.dtype == x.dtype and tensor.device == x.device
        if tuple(tensor.shape) != shape or not same or not tensor.is_contiguous(memory_format=layout):
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {list(tensor.stride())}; "
                f"expected {list(shape)} {x.dtype} on {x.device}, {'channels_last' if image else 'contiguous'}"
            )
    pointers = [tensor.data_ptr() if tensor is not None else None for tensor, _ in shapes.values()]
    sizes = (n, h, w, c, hidden, k, stride, ACTIVATIONS.index(act_inner), ACTIVATIONS.index(tail.act))
    functions = library_for("cpu" if x.device.type == "cpu" else capability_of(x.device).split(":")[0])
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    with torch.cuda.device_of(x):
        error = functions.depthfuse_inverted_residual(
            (ctypes.c_void_p * 11)(*pointers, y.data_ptr()),
            (ctypes.c_int32 * len(sizes))(*sizes),
            _DTYPES.get(x.dtype, -1),
            ctypes.c_void_p(stream),
        )
    if error == -1:
        raise ValueError(
            f"there is no native inverted residual of {c} to {k} channels, stride {stride}, {x.dtype} on "
            f"{x.device.type}: use depthfuse.ops.inverted_residual"
        )
    if error:
        raise RuntimeError(f"the native inverted residual failed with the driver's error {error}")
    return y
