"""The devices that depthfuse knows of, and how a device that is here is called."""

from __future__ import annotations

import platform

import torch


def cpu_name() -> str:
    """The processor as its maker calls it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The device as its maker calls it, for labels on measurements."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def capability_of(device: torch.device) -> str:
    """ "sm_90" or "gfx908:..." of a GPU, "AVX512" or the like of a CPU: the instructions that it has."""
    if device.type != "cuda":
        return torch.backends.cpu.get_cpu_capability()
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"
