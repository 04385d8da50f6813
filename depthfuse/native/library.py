"""Find the engine's shared library, or have it built, and speak to it.

It is plain C at the border, so one binary serves every version of PyTorch. It comes with the package, or is built at
first use, once, into the user's cache (`building.py`). Where neither works there is no engine, and nothing else
changes. `DEPTHFUSE_NATIVE=0` does without it; `DEPTHFUSE_ISA=avx512_bf16` does without tiles, `avx512` without any
products of bfloat16, `avx2` and `baseline` with narrower vectors.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from depthfuse.measured_cache import cache_folder
from depthfuse.native.building import BUILT, NAME, Missing, compile_engine, compiler, digest, made

ABI_VERSION = 8


class TensorSpec(ctypes.Structure):
    """df_tensor of csrc/cpu/abi.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("place", "index", "n", "h", "w", "c", "border")]


class NodeSpec(ctypes.Structure):
    """df_node of csrc/cpu/abi.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("op", "x", "x2", "y", "act", "algorithm")),
        ("p", ctypes.c_int32 * 10),
        ("f", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("weight", "bias", "scale", "shift")),
    ]


def library() -> ctypes.CDLL:
    """The engine's functions.

    Raises Missing: it is switched off, there is no compiler or no place to keep what it makes, or that does not load.
    """
    loaded = _loaded()
    if isinstance(loaded, str):
        raise Missing(loaded)
    return loaded


def ready() -> ctypes.CDLL | None:
    """The engine's functions, where something has asked for them before: nothing is built or loaded for this."""
    if not _loaded.cache_info().currsize:
        return None
    loaded = _loaded()
    return None if isinstance(loaded, str) else loaded


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """The functions, or why there are none: a compiler that fails is not asked twice."""
    if os.environ.get("DEPTHFUSE_NATIVE", "1") == "0":
        return "DEPTHFUSE_NATIVE is 0"
    try:
        loaded = ctypes.CDLL(str(_built()))
    except Missing as reason:
        return str(reason)
    except OSError as error:
        return f"the engine's library does not load: {error}"
    pointer = ctypes.c_void_p
    loaded.df_isa.restype = ctypes.c_char_p
    loaded.df_plan_create.restype = pointer
    loaded.df_plan_create.argtypes = [
        ctypes.POINTER(TensorSpec), ctypes.c_int32, ctypes.POINTER(NodeSpec), ctypes.c_int32,
        pointer, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64,
    ]  # fmt: skip
    loaded.df_plan_run.restype = None
    loaded.df_plan_run.argtypes = [pointer, pointer, pointer, ctypes.c_int32, pointer]
    loaded.df_all_within.restype = ctypes.c_int32
    loaded.df_all_within.argtypes = [pointer, ctypes.c_int64, ctypes.c_float]
    for of_halves in (loaded.df_widen, loaded.df_narrow):
        of_halves.restype = None
        of_halves.argtypes = [pointer, ctypes.c_int64, ctypes.c_int32, pointer]
    loaded.df_plan_bytes.restype = ctypes.c_int64
    loaded.df_plan_bytes.argtypes = [pointer]
    loaded.df_plan_destroy.restype = None
    loaded.df_plan_destroy.argtypes = [pointer]
    if loaded.df_abi_version() != ABI_VERSION:
        return f"the engine speaks version {loaded.df_abi_version()}, expected {ABI_VERSION}"
    return loaded


def why_missing() -> str | None:
    """Why there is no engine here, or None where there is one."""
    try:
        library()
    except Missing as reason:
        return str(reason)
    return None


def isa() -> str:
    """The instruction set that runs: "amx" (AVX-512, and tiles), "avx512_bf16" (products of bfloat16 without tiles),
    "avx512", "avx2" or "baseline". Raises Missing.
    """
    return library().df_isa().decode()


def in_words() -> str:
    """What runs, and why; nothing is built for that."""
    try:
        is_wanted = os.environ.get("DEPTHFUSE_NATIVE", "1") != "0"
        if is_wanted and not (BUILT / digest() / NAME).exists() and not cached(NAME, digest()).exists():
            return f"built at first use, by {compiler()}"
        asked, runs = os.environ.get("DEPTHFUSE_ISA"), isa()
        if asked == runs:
            return f"{runs} (DEPTHFUSE_ISA is {asked})"
        ignored = f"; DEPTHFUSE_ISA is {asked}" if asked else ""
        return f"{runs} (the widest that this processor has{ignored})"
    except Missing as reason:
        return f"none: {reason}"


def _built() -> Path:
    built = BUILT / digest() / NAME
    return built if built.exists() else made(cached(NAME, digest()), compile_engine)


def cached(name: str, digest: str) -> Path:
    """Where the user's cache keeps a library. Raises Missing: this user has no cache."""
    folder = cache_folder()
    if folder is None:
        raise Missing("this user has no home to keep native code in; set DEPTHFUSE_CACHE_DIR to a folder")
    return folder / "native" / digest / name
