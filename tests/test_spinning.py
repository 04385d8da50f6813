"""PyTorch's threads spin for a moment only where depthfuse is imported before it, unless the user has chosen."""

import os
import subprocess
import sys

import pytest

from depthfuse._spinning import VARIABLES


def environment_after(*imports, **chosen):
    """The variables after such imports, and the word of `depthfuse env`."""
    code = f"""
import os, {", ".join(imports)}
from depthfuse.env import render
print([os.environ.get(name) for name in {VARIABLES}])
print(next(line for line in render().splitlines() if line.startswith("OpenMP")))
"""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | chosen
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    found, told = done.stdout.splitlines()
    return found, told.removeprefix("OpenMP").strip()


def test_before_torch():
    assert environment_after("depthfuse", "torch") == ("['10000', None]", "GOMP_SPINCOUNT=10000")


def test_after_torch_it_is_too_late():
    found, told = environment_after("torch", "depthfuse")
    assert found == "[None, None]" and "import depthfuse before torch, or set GOMP_SPINCOUNT=10000" in told


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({"GOMP_SPINCOUNT": "5"}, "['5', None]"),
        ({"OMP_WAIT_POLICY": "active"}, "[None, 'active']"),
        ({"GOMP_SPINCOUNT": "5", "OMP_WAIT_POLICY": "passive"}, "['5', 'passive']"),
    ],
)
def test_what_the_user_chose_stays(chosen, found):
    told = ", ".join(f"{name}={value}" for name, value in chosen.items())
    assert environment_after("depthfuse", "torch", **chosen) == (found, told)
