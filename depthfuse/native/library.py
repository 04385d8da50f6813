"""Find or build the engine's shared library, and speak to it.

It is plain C at the border, so one binary serves every version of PyTorch. It is built from the sources that the
package brings by the machine's g++: by `python -m depthfuse.native` into the package, as `make` does, or else at
first use, once, into the user's cache. Where there is no compiler there is no engine, and nothing else changes.
`DEPTHFUSE_NATIVE=0` does without it; `DEPTHFUSE_ISA=avx512` does without tiles, `avx2` and `baseline` with narrower
vectors. `DEPTHFUSE_CXXFLAGS` gives the compiler more flags, such as a sanitizer's; each set of flags has a binary of
its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from depthfuse.measured_cache import cache_folder

logger = logging.getLogger(__name__)

ABI_VERSION = 4
CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = CSRC / "cpu"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fvisibility=hidden")
NAME = "libdepthfuse_cpu.so"
BUILT = Path(__file__).resolve().parent / "built"


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


class Missing(Exception):
    """Why there is no engine, in words."""


def library() -> ctypes.CDLL:
    """The engine's functions.

    Raises Missing: it is switched off, there is no compiler or no place to keep what it makes, or that does not load.
    """
    loaded = _loaded()
    if isinstance(loaded, str):
        raise Missing(loaded)
    return loaded


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
    """The instruction set that runs: "amx" (AVX-512, and tiles), "avx512", "avx2" or "baseline". Raises Missing."""
    return library().df_isa().decode()


def in_words() -> str:
    """What runs, and why; nothing is built for that."""
    try:
        is_wanted = os.environ.get("DEPTHFUSE_NATIVE", "1") != "0"
        if is_wanted and not (BUILT / digest() / NAME).exists() and not cached(NAME, digest()).exists():
            return f"built at first use, by {_compiler()}"
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


def made(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made if it is not there: whole or not at all, by one process or by several at once.

    Raises Missing: there is no place for it, or whatever `make` raises.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            make(Path(scratch, target.name))
            os.replace(Path(scratch, target.name), target)
    except OSError as error:
        raise Missing(f"{target} cannot be built: {error}") from error
    return target


@functools.cache
def digest() -> str:
    """Of the sources and of what compiles them: names the folder that holds the result. Raises Missing."""
    if not SOURCES.is_dir():
        raise Missing("this installation has no sources of the engine")
    digest = hashlib.sha256(repr((_flags(), platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *shlex.split(os.environ.get("DEPTHFUSE_CXXFLAGS", "")))


def _compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        raise Missing("there is no g++ to build the engine with (or set CXX)")
    return found


def compile_engine(target: Path) -> None:
    """Compile the engine into `target`, with its objects beside it. Raises Missing."""
    compiler = _compiler()
    logger.warning("building the native CPU engine, once: about half a minute of %s", compiler)
    sources = sorted(SOURCES.glob("*.cc"))
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [compiler, *_flags(), "-c", str(source), "-o", str(result)]
            for source, result in zip(sources, objects, strict=True)
        ]
        list(pool.map(run_compiler, commands))
    run_compiler([compiler, *_flags(), "-shared", *map(str, objects), "-o", str(target), "-pthread"])


def run_compiler(command: list[str], **environment: str) -> str:
    """What it says. Raises Missing where it fails, with its first error."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise Missing(f"{command[0]} fails: {reason}")
    return done.stderr
