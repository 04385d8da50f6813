"""Finding and building the engine: without a compiler, or without leave, nothing else changes."""

import os
import shutil
import subprocess
import sys

import pytest
from native_ops import needs_engine

from depthfuse.native import building
from depthfuse.native import library as module
from depthfuse.native.building import Missing
from depthfuse.native.library import why_missing

CODE = """
import torch
from torch import nn
import depthfuse
from depthfuse.native.library import why_missing
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval()
x = torch.randn(1, 3, 8, 8)
fast = depthfuse.accelerate(model, x, engines="own")
assert torch.allclose(fast(x), model(x), atol=1e-5)
print(why_missing())
"""


def accelerate_with(tmp_path, **environment):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"DEPTHFUSE_CACHE_DIR": str(tmp_path / "cache")} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_leave_all_runs_as_before(tmp_path):
    assert accelerate_with(tmp_path, DEPTHFUSE_NATIVE="0") == "DEPTHFUSE_NATIVE is 0"


def test_without_a_compiler_all_runs_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUILT", tmp_path / "nothing")
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Missing, match="no g\\+\\+"):
        module._built()
    monkeypatch.setenv("CXX", sys.executable)  # a compiler that fails
    with pytest.raises(Missing, match="fails: "):
        module._built()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_without_a_place_to_keep_it_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUILT", tmp_path / "nothing")
    monkeypatch.setattr(module, "cache_folder", lambda: None)
    with pytest.raises(Missing, match="DEPTHFUSE_CACHE_DIR"):
        module._built()


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_where_there_is_a_compiler_there_is_an_engine():
    """Without this, an engine that does not build would only skip its tests."""
    assert why_missing() is None


def test_what_runs_is_said_and_nothing_built_for_that(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUILT", tmp_path / "nothing")
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", sys.executable)
    assert module.in_words() == f"built at first use, by {sys.executable}"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.in_words().startswith("none: there is no g++")
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_fails_is_asked_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "_built", lambda: asked.append(1) or building.run_compiler([sys.executable, "-c", "1/0"])
    )
    module._loaded.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(Missing, match="fails: "):
                module.library()
        assert len(asked) == 1
    finally:
        module._loaded.cache_clear()


@needs_engine
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_vectors_can_be_asked_for(isa, tmp_path):
    code = "from depthfuse.native.library import isa; print(isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"DEPTHFUSE_ISA": isa}, capture_output=True, text=True
    )
    assert done.stdout.strip() in (isa, "baseline"), done.stderr


def test_each_set_of_flags_has_a_binary_of_its_own(monkeypatch):
    monkeypatch.delenv("DEPTHFUSE_CXXFLAGS", raising=False)
    plain = building.digest.__wrapped__()
    monkeypatch.setenv("DEPTHFUSE_CXXFLAGS", "-g -fsanitize=thread")
    assert building.digest.__wrapped__() != plain
    assert building.flags()[-2:] == ("-g", "-fsanitize=thread")


@needs_engine
def test_an_instruction_set_that_does_not_run_is_not_called_the_reason(monkeypatch):
    monkeypatch.setattr(module, "isa", lambda: "avx2")
    monkeypatch.setenv("DEPTHFUSE_ISA", "avx512")
    assert module.in_words() == "avx2 (the widest that this processor has; DEPTHFUSE_ISA is avx512)"
    monkeypatch.setenv("DEPTHFUSE_ISA", "avx2")
    assert module.in_words() == "avx2 (DEPTHFUSE_ISA is avx2)"
