"""Kernels of csrc/gpu, HIP and CUDA from one source: built for the device at hand, or for the CPU to test them there.

The inverted residual keeps its expanded tile in shared memory, which Triton cannot index: it expands each input 1.56
times where ours in Triton expands it 4 times. It has not run on a GPU yet, so `accelerate` does not offer it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.devices import capability_of
from depthfuse.kernels.arguments import NO_TAIL, Tail, ThreeLayers
from depthfuse.native.building import CSRC, Missing, made, run_compiler
from depthfuse.native.library import cached
from depthfuse.native.plan import ACTIVATIONS

logger = logging.getLogger(__name__)

SOURCE = CSRC / "gpu" / "inverted_residual.cu"
SIZES = ((16, 32), (32, 32), (32, 64), (64, 64))  # channels in and out that there are kernels for
HIDDEN_MULTIPLE = 32
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
    command = compiler_of(arch)
    digest = hashlib.sha256(repr(command).encode())
    for source in sorted(SOURCE.parent.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())

    def make(target: Path) -> None:
        logger.warning("building the native kernels for %s, once", arch)
        run_compiler([*command, "-shared", str(SOURCE), "-o", str(target)], HIP_PLATFORM="amd")

    try:
        return ctypes.CDLL(str(made(cached(f"libdepthfuse_{arch}.so", digest.hexdigest()[:16]), make)))
    except OSError as error:
        raise Missing(f"the kernels for {arch} do not load: {error}") from error


class Packed(NamedTuple):
    """The weights of an inverted residual as the kernel reads them: padded with zeros to whole tiles."""

    w1: Tensor  # [hidden, channels]
    b1: Tensor  # [hidden]
    w2: Tensor  # [9, hidden]: a tap's channels side by side
    b2: Tensor  # [hidden]
    w3: Tensor  # [out_channels, hidden]
    channels: int  # as given, unpadded
    out_channels: int


def pack(weights: ThreeLayers) -> Packed:
    """Pack [hidden, C, 1, 1], [hidden], [hidden, 1, 3, 3], [hidden], [K, hidden, 1, 1], once for many calls.

    Raises ValueError: other shapes, or more than 64 channels in or out.
    """
    w1, b1, w2, b2, w3 = weights
    (hidden, channels), k = w1.shape[:2], w3.shape[0]
    shapes = [(hidden, channels, 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,), (k, hidden, 1, 1)]
    for (name, tensor), shape in zip(weights._asdict().items(), shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    size = next((size for size in SIZES if channels <= size[0] and k <= size[1]), None)
    if size is None:
        raise ValueError(
            f"there is no native inverted residual of {channels} to {k} channels, expected at most 64: "
            "use depthfuse.ops.inverted_residual"
        )
    more = -hidden % HIDDEN_MULTIPLE
    return Packed(
        F.pad(w1.flatten(1), (0, size[0] - channels, 0, more)),
        F.pad(b1, (0, more)),
        F.pad(w2.flatten(1).T, (0, more)).contiguous(),
        F.pad(b2, (0, more)),
        F.pad(w3.flatten(1), (0, more, 0, size[1] - k)),
        channels,
        k,
    )


def inverted_residual(
    x: Tensor,  # [N, C, H, W] channels_last
    weights: Packed,
    tail: Tail = NO_TAIL,  # residual [N, K, P, Q] channels_last
    *,
    stride: int = 1,
    act_inner: str = "relu6",
) -> Tensor:  # [N, K, P, Q] channels_last
    """`depthfuse.ops.inverted_residual` by the native kernel, in float16 and bfloat16; on a CPU in float32, too.

    Stride 1 or 2. All tensors of one dtype, on one device.

    Raises:
        Missing: there is no compiler for the device. ValueError: a shape, layout, dtype or name that it does not take.
        RuntimeError: the driver's error, by its number.
    """
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}, expected 1 or 2: use depthfuse.ops.inverted_residual")
    n, c, h, w = x.shape
    k = weights.out_channels
    size = [(extent - 1) // stride + 1 for extent in (h, w)]
    y = x.new_empty((n, k, *size)).contiguous(memory_format=torch.channels_last)
    _check(x, "x", x, (n, weights.channels, h, w))
    (hidden, padded_c), padded_k = weights.w1.shape, weights.w3.shape[0]
    shapes = ((hidden, padded_c), (hidden,), (9, hidden), (hidden,), (padded_k, hidden))
    for name, tensor, shape in zip(weights._fields, weights, shapes, strict=False):  # and two numbers
        _check(x, name, tensor, shape)
    for name, tensor in tail.tensors("b3").items():
        if tensor is not None:
            _check(x, name, tensor, tuple(y.shape) if name == "residual" else (k,))
    tensors = (x, *weights[:5], *tail[:4], y)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (
        *(n, h, w, c, hidden, k, stride),
        *(_number(act_inner), _number(tail.act)),
        *(padded_c, padded_k),
    )
    functions = library_for("cpu" if x.device.type == "cpu" else capability_of(x.device).split(":")[0])
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    with torch.cuda.device_of(x):
        error = functions.depthfuse_inverted_residual(
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int32 * len(sizes))(*sizes),
            _DTYPES.get(x.dtype, -1),
            ctypes.c_void_p(stream),
        )
    if error == -1:
        raise ValueError(f"there is no native inverted residual of {x.dtype} on {x.device.type}")
    if error == -2:
        raise RuntimeError("the native inverted residual has a race: a barrier is missing")
    if error:
        raise RuntimeError(f"the native inverted residual failed with the driver's error {error}")
    return y


def _number(act: str) -> int:
    if act not in ACTIVATIONS:
        raise ValueError(f"there is no activation {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(act)


def _check(x: Tensor, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    same = tensor.dtype == x.dtype and tensor.device == x.device
    if tuple(tensor.shape) != shape or not same or not tensor.is_contiguous(memory_format=layout):
        raise ValueError(
            f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {list(tensor.stride())}; "
            f"expected {list(shape)} {x.dtype} on {x.device}, "
            f"{'channels_last' if layout is torch.channels_last else 'contiguous'}"
        )
