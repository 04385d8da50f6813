"""Which backend runs: what a device's architecture says to it."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from depthfuse.ops import BackendError, backend, linear, resolve_backend, trust

pytest.importorskip("triton", reason="without Triton every device takes the reference")


@pytest.fixture
def amd(monkeypatch):
    """As on a ROCm device of a given architecture."""

    def become(arch: str) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.4")
        properties = SimpleNamespace(gcnArchName=f"{arch}:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(backend, "_logged", set())
        backend._amd_architecture.cache_clear()

    yield become
    backend._amd_architecture.cache_clear()


@pytest.mark.parametrize("arch", ["gfx1030", "gfx1100", "gfx1201"])
def test_waves_of_32_lanes_are_refused_by_name(arch, amd, caplog):
    amd(arch)
    name, reason = resolve_backend("auto", "cuda")
    assert name == "reference"
    assert f"{arch} runs waves of 32 lanes" in reason
    with pytest.raises(BackendError, match=f"backend 'triton' cannot run: .*{arch} runs waves of 32 lanes"):
        resolve_backend("triton", "cuda:0")


@pytest.mark.parametrize("arch", ["gfx908", "gfx90a", "gfx942", "gfx950"])
def test_waves_of_64_lanes_run_triton(arch, amd):
    amd(arch)
    assert resolve_backend("auto", "cuda")[0] == resolve_backend("triton", "cuda")[0] == "triton"


def test_nvidia_is_not_asked_for_an_amd_architecture(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    assert resolve_backend("auto", "cuda")[0] == "triton"


def test_a_kernel_that_fails_is_replaced_and_not_tried_again(monkeypatch, caplog):
    """For the shape with which it failed; asked for by name, its own error comes out."""
    kernel = importlib.import_module("depthfuse.kernels.linear")
    declare = importlib.import_module("depthfuse.ops.declare")

    tries = []

    def fails(*args, **kwargs):
        tries.append(args)
        raise RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 65536")

    def on_a_card(op, backend_name, x, refusal):
        return trust.refusal_of(op, x) is None

    monkeypatch.setattr(trust, "_failed", {})
    monkeypatch.setattr(declare, "runs_triton", on_a_card)
    monkeypatch.setattr(kernel, "linear", fails)
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    for _ in range(3):
        assert torch.allclose(linear(x, weight), x @ weight.T, atol=1e-6)
    assert len(tries) == 1
    assert caplog.text.count("its kernel failed (RuntimeError: out of resource: shared memory") == 1
    linear(torch.randn(5, 8), weight)
    assert len(tries) == 2
    monkeypatch.setattr(trust, "_failed", {})
    with pytest.raises(RuntimeError, match="out of resource"):
        linear(x, weight, backend="triton")


def test_the_choice_on_a_cpu_imports_no_kernels(monkeypatch):
    monkeypatch.delitem(sys.modules, "depthfuse.kernels.launch", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert resolve_backend("auto", "cpu")[0] == "reference"
    assert "depthfuse.kernels.launch" not in sys.modules
