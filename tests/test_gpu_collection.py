"""`make test-gpu` finds its tests where only torch, triton, timm and pytest are installed."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of all that the package and its tests can use, what a machine with a GPU need not have.
ABSENT = (
    "tyro",
    "scipy",
    "optuna",
    "torch_pruning",
    "webdataset",
    "datasets",
    "expecttest",
    "onnxruntime",
    "openvino",
)
BLOCK = f"""
import importlib.machinery, importlib.util, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in {ABSENT!r} else find_spec(name, package)
)
"""


def test_gpu_tests_are_collected_without_the_extras(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "-m",
        "gpu",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert any("test_replays_give_what_the_plan_gives" in line for line in collected)


def test_the_proof_of_a_gpu_needs_no_extras(tmp_path):
    """`make gpu-proof` and all that its tasks import."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    modules = (
        "benchmarks.gpu_proof.__main__",
        "benchmarks.gpu_proof.work",
        "benchmarks.models.__main__",
        "benchmarks.kernels.micro",
        "benchmarks.kernels.tune",
        "depthfuse.selftest.run",
    )
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
