"""Build the engine's shared library from the sources that the package brings, by the machine's g++.

By `python -m depthfuse.native` into the package, as `make` does; by setup.py into a wheel; or else at first use, once,
into the user's cache. `DEPTHFUSE_CXXFLAGS` gives the compiler more flags, such as a sanitizer's; each set of flags has
a binary of its own. Nothing but Python is needed here: a wheel is built where there is no torch.
"""

from __future__ import annotations

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

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent.parent
CSRC = PACKAGE / "csrc"
SOURCES = CSRC / "cpu"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fvisibility=hidden")
NAME = "libdepthfuse_cpu.so"
BUILT = PACKAGE / "native" / "built"


class Missing(Exception):
    """Why there is no engine, in words."""


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
    digest = hashlib.sha256(repr((flags(), platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def flags() -> tuple[str, ...]:
    return (*FLAGS, *shlex.split(os.environ.get("DEPTHFUSE_CXXFLAGS", "")))


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        raise Missing("there is no g++ to build the engine with (or set CXX)")
    return found


def compile_engine(target: Path) -> None:
    """Compile the engine into `target`, with its objects beside it. Raises Missing."""
    by = compiler()
    logger.warning("building the native CPU engine, once: a minute or two of %s", by)
    sources = sorted(SOURCES.glob("*.cc"))
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [by, *flags(), "-c", str(source), "-o", str(result)]
            for source, result in zip(sources, objects, strict=True)
        ]
        list(pool.map(run_compiler, commands))
    run_compiler([by, *flags(), "-shared", *map(str, objects), "-o", str(target), "-pthread"])


def run_compiler(command: list[str], **environment: str) -> str:
    """What it says. Raises Missing where it fails, with its first error."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise Missing(f"{command[0]} fails: {reason}")
    return done.stderr
