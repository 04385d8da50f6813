"""Which backend runs: what a device's architecture says to it."""

from types import SimpleNamespace

import pytest
import torch

from depthfuse.ops import BackendError, backend, resolve_backend

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
