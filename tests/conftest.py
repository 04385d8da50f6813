"""Set-up of every test run: must happen before a test module imports depthfuse or triton."""

import importlib
import logging
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Works from a checkout that is not installed, in this process and in those that tests start.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# Triton reads this when a kernel is decorated, so it must be set before the first kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

importlib.import_module("depthfuse")  # first, so that a test may import timm beside a CPU-only torch

# Files are written safely, which waits for the disk each time, some 10 ms: a third of the suite's time.
_MEMORY = Path("/dev/shm")
if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK):
    facts = os.statvfs(_MEMORY)
    roomy = facts.f_bavail * facts.f_frsize > 4 * 2**30
    if roomy and not facts.f_flag & os.ST_NOEXEC:  # engines are built there
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

# Several workers with a pool of threads each would slow each other down many times over.
if "PYTEST_XDIST_WORKER" in os.environ:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.fixture(autouse=True, scope="session")
def cache_dir(tmp_path_factory):
    """What tests measure stays out of the user's cache; processes that they start share it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DEPTHFUSE_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, NumPy and torch before each test, so that a failure repeats; returns the seed."""
    value = 20240112
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def restored_logger():
    """Leaves the package's log as it was: a command sets it up."""
    package = logging.getLogger("depthfuse")
    before = package.handlers, package.propagate, package.level
    yield
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])


@pytest.fixture(autouse=True, scope="session")
def short_rounds():
    """Candidates are tried and timed as for users, but each for a moment: no test depends on which one wins."""
    from depthfuse.acceleration.running import choose
    from depthfuse.measuring import timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "_ROUND_MS", 0.2)
        patch.setattr(timing, "_SETTLE_MS", 0.2)
        yield
