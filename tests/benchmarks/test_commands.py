"""Every benchmark can at least be started: none imports what is no longer there."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="most benchmarks are of the kernels, which are written in Triton")
ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "benchmarks").rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_it_is_imported(name):
    importlib.import_module(name)
