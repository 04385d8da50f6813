"""What this machine has, and which backend each op would use on it and why. Printed by `depthfuse env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from depthfuse import _spinning
from depthfuse.devices import capability_of, cpu_name
from depthfuse.native.library import in_words
from depthfuse.ops import onednn, resolve_backend

_PACKAGES = (
    "torch",
    "triton",
    "timm",
    "torchvision",
    "numpy",
    "safetensors",
    "scipy",
    "onnxruntime",
    "openvino",
    "executorch",
    "zentorch",
)
# Each op, and whether a CPU has fused ops of oneDNN for it.
_OPS = {
    "conv2d": True,
    "depthwise conv2d": True,
    "linear": True,
    "inverted_residual": False,
    "mlp": False,
    "attention": False,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def collect() -> dict[str, Any]:
    """Versions, devices and backends, as plain JSON-ready values.

    Returns:
        {"versions": {package: version or None}, "cpu": {...}, "gpus": [{...}],
        "backends": {device: {op: {"backend": name, "reason": words}}}}
    """
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backends": {
            device: {op: _backend(device, has_onednn) for op, has_onednn in _OPS.items()}
            for device in devices
        },
    }


def versions() -> dict[str, str | None]:
    """Of Python, of the packages that matter, and of what torch was built for; None where it is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # the distribution may be called otherwise, and lacks "+cpu"
    found["cuda"] = torch.version.cuda
    found["hip"] = torch.version.hip
    return found


def _cpu() -> dict[str, Any]:
    return {
        "name": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native_engine": in_words(),
        "openmp": _spinning.in_words(),
        "onednn_fused_dtypes": [_name(dtype) for dtype in _DTYPES if onednn.available(dtype)],
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "architecture": capability_of(torch.device("cuda", index)),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _backend(device: str, has_onednn: bool) -> dict[str, str]:
    name, reason = resolve_backend("auto", device)
    if name == "reference" and device == "cpu":
        dtypes = [_name(dtype) for dtype in _DTYPES if has_onednn and onednn.available(dtype)]
        fused = f"oneDNN fused ops in {', '.join(dtypes)}" if dtypes else "plain PyTorch"
        reason = f"{fused}; {reason}"
    return {"backend": name, "reason": reason}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def render() -> str:
    """`collect()` as text, one fact a line."""
    facts = collect()
    cpu = facts["cpu"]
    lines = [f"{name:<12} {version or 'none'}" for name, version in facts["versions"].items()]
    lines.append(f"{'platform':<12} {facts['platform']}")
    lines.append(
        f"{'cpu':<12} {cpu['name']}, {cpu['capability']}, {cpu['cores']} cores, {cpu['threads']} threads"
    )
    lines.append(f"{'engine':<12} native: {cpu['native_engine']}")
    lines.append(f"{'OpenMP':<12} {cpu['openmp']}")
    for index, gpu in enumerate(facts["gpus"]):
        lines.append(
            f"{f'cuda:{index}':<12} {gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors"
        )
    if not facts["gpus"]:
        lines.append(f"{'gpu':<12} none that this torch can use")
    for device, ops in facts["backends"].items():
        for op, choice in ops.items():
            lines.append(f"{device:<12} {op}: {choice['backend']} ({choice['reason']})")
    return "\n".join(lines)
