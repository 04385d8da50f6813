"""How a kernel is launched: the target it is planned for, and the plan itself.

Every operator in this folder has three functions: `config_for` (the heuristic that picks tile sizes), `plan`
(arguments in, `Launch` out, nothing compiled) and the operator itself, which runs the plan. Planning apart from
running lets `benchmarks/prove.py` compile, for cards that are not there, exactly what a launch would compile here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from depthfuse.devices import DEVICES
from depthfuse.kernels.arguments import Tail


@dataclass(frozen=True)
class Target:
    """What a heuristic may depend on.

    Attributes:
        backend: "cuda", "hip" or "interpreter".
        arch: "sm_90", "gfx908", ...
        compute_units: streaming multiprocessors or compute units; a grid below this leaves some idle.
        shared_bytes: shared memory (LDS) that one program may use.
    """

    backend: str
    arch: str
    compute_units: int
    shared_bytes: int

    @property
    def capability(self) -> tuple[int, int] | None:
        """(major, minor) of a CUDA device, (10, 0) for "sm_100"; None elsewhere. As words, those do not compare."""
        if self.backend != "cuda":
            return None
        return divmod(int(self.arch.removeprefix("sm_")), 10)


TARGETS = {
    arch: Target(device.backend, arch, device.compute_units, device.shared_bytes)
    for arch, device in DEVICES.items()
}
INTERPRETER = Target("interpreter", "cpu", 1, 1 << 30)


@triton.jit
def _probe(x):
    tl.store(x, 0)


# TRITON_INTERPRET acts when a kernel is decorated, so what counts is how this module's own kernel came out.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        shared = TARGETS[arch].shared_bytes if arch in TARGETS else 65536
        return Target("hip", arch, properties.multi_processor_count, shared)
    arch = f"sm_{properties.major}{properties.minor}"
    return Target("cuda", arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def target_of(x: torch.Tensor) -> Target:
    """The target that a kernel on `x` would run on.

    Raises:
        ValueError: `x` is not on a GPU and the kernels were not imported with TRITON_INTERPRET=1.
    """
    if _stand_in is not None:
        return _stand_in[0]
    if INTERPRETED:
        return INTERPRETER
    if not x.is_cuda:
        raise ValueError(
            f"x is on {x.device}, but Triton kernels need a GPU tensor; move it to a GPU, use the reference backend, "
            "or set TRITON_INTERPRET=1 before depthfuse is imported (slow, for tests)"
        )
    return _device_target(x.device.index)


@dataclass(frozen=True)
class Launch:
    """A kernel with everything its launch needs.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: number of programs along each axis.
        arguments: name -> tensor, integer, constexpr value or None, for every parameter of the kernel.
        options: compiler options (num_warps, num_stages, and those of one vendor only).
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self, x: torch.Tensor) -> None:
        """Launch on the device and current stream of `x`. A grid with a zero in it is no launch."""
        if 0 in self.grid:
            return
        if _stand_in is not None:
            _stand_in[1](self)
            return
        with torch.cuda.device_of(x):
            self.kernel[self.grid](**self.arguments, **self.options)


_stand_in: tuple[Target, Callable[[Launch], None]] | None = None


@contextlib.contextmanager
def stand_in(target: Target, run: Callable[[Launch], None]) -> Iterator[None]:
    """Within, kernels on any tensor are planned for `target`, and `run` is called in place of each launch.

    For a card that is not there (`benchmarks/gfx908`); one thread at a time.
    """
    global _stand_in
    before, _stand_in = _stand_in, (target, run)
    try:
        yield
    finally:
        _stand_in = before


def is_stood_in() -> bool:
    """Whether launches go to a stand-in."""
    return _stand_in is not None


# How much the compiler may overlap on gfx908 (`compiler_options`).
DRAINED, IN_FLIGHT, REORDERED = range(3)


def compiler_options(
    target: Target,
    num_warps: int,
    num_stages: int,
    nonkdim: int = 0,
    kpack: int = 1,
    overlap: int = IN_FLIGHT,
) -> dict:
    """Compiler options of a launch; `nonkdim` and `kpack` shape AMD's matrix instructions and are left out elsewhere.

    enable_fp_fusion lets a*b+c become one FMA; its default differs between Triton's versions.

    `overlap` is for gfx908 alone, and for versions of Triton that can hand LLVM attributes (3.9). LLVM waits
    there for all loads before every barrier (DRAINED): loading ahead gains nothing, each step exposes its
    loads' latency. The hardware asks for that only where an exception must be able to leave a barrier, and
    AMD's Composable Kernel leaves it out on this card, too (IN_FLIGHT); what a barrier orders is shared memory,
    for which LLVM waits in any case. REORDERED has LLVM's scheduler look for independent instructions first,
    which pays in loops of matrix products and spills where registers are short.
    """
    if target.backend == "interpreter":
        return {}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if target.backend == "hip":
        options |= {"matrix_instr_nonkdim": nonkdim, "kpack": kpack}
    if target.arch == "gfx908" and overlap != DRAINED and _takes_attributes():
        reordered = ",amdgpu-sched-strategy=iterative-ilp" if overlap == REORDERED else ""
        options["llvm_fn_attrs"] = "target-features=+back-off-barrier" + reordered
    return options


@functools.cache
def _takes_attributes() -> bool:
    """Whether this Triton's compiler for AMD hands attributes to LLVM; an option that it does not know is an error."""
    try:
        from triton.backends.amd.compiler import HIPOptions
    except ImportError:
        return False
    return "llvm_fn_attrs" in HIPOptions.__dataclass_fields__


def needs_wide_offsets(*tensors: torch.Tensor | None) -> bool:
    """Whether any tensor has offsets beyond int32. 32-bit offsets are cheaper, and AMD's buffer loads need them.

    What counts is how far apart its elements lie: of a view there may be few.
    """
    return any(t is not None and extent(t) >= 2**31 for t in tensors)


def extent(tensor: torch.Tensor) -> int:
    """Elements from the first of a tensor to its last, those between its own included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def require_channels_last(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError for a 4-d tensor that is not dense channels_last: the kernels index by that layout."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.is_contiguous(memory_format=torch.channels_last):
            continue
        raise ValueError(
            f"{name} {list(tensor.shape)} has strides {list(tensor.stride())}, expected channels_last; "
            f"pass {name}.contiguous(memory_format=torch.channels_last)"
        )


def require_rows(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError for a tensor that is not contiguous: the kernels index rows by their width."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} {list(tensor.shape)} has strides {list(tensor.stride())}, expected contiguous; "
                f"pass {name}.contiguous()"
            )


def require_tail(tail: Tail, require_residual: Callable[..., None]) -> None:
    """Raise ValueError where a tensor of the tail is not laid out as the kernels read it.

    `require_residual` is `require_channels_last` for images and `require_rows` for rows.
    """
    require_rows(bias=tail.bias, scale=tail.scale, shift=tail.shift)
    require_residual(residual=tail.residual)


def empty_image(shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] in channels_last, not filled, of the dtype and on the device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def dot_refusal(dtype: torch.dtype) -> str | None:
    """Why matrix products of `dtype` are wrong here, or None: bfloat16 in Triton's interpreter."""
    if dtype is torch.bfloat16 and INTERPRETED:
        return "bfloat16 in Triton's interpreter, whose matrix products of it are wrong"
    return None


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1
