"""The devices that depthfuse knows of, and how a device that is here is called.

`DEVICES` is the one list of GPUs: rooflines and predictions take the peaks from it, kernels their targets, and the
command line its names.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peaks:
    """What a device reaches at best in one dtype.

    matrix_tflops: of large matrix products. vector_tflops: of multiply-adds outside the matrix units, which depthwise
    convolution uses. source: where the numbers come from, in words.
    """

    matrix_tflops: float
    vector_tflops: float
    bandwidth_gbps: float
    source: str

    def least_ms(self, flops: float, bytes_moved: float, matrix: bool = True) -> float:
        """Milliseconds that `flops` (a multiply-add is 2) and `bytes_moved` take at least.

        Args:
            matrix: whether the matrix units can do the arithmetic.
        """
        tflops = self.matrix_tflops if matrix else self.vector_tflops
        return max(flops / tflops / 1e9, bytes_moved / self.bandwidth_gbps / 1e6)


@dataclass(frozen=True)
class Device:
    """One GPU (one die, where a card has two): what is published of it.

    option: its name on the command line and in configurations.
    backend: what Triton calls its maker's platform, "cuda" or "hip".
    arch: the architecture that compilers know it by.
    compute_units: streaming multiprocessors or compute units.
    shared_bytes: shared memory (LDS) that one program may use.
    shared_bytes_per_unit: shared memory that all programs of a compute unit have together.
    warps_per_unit: warps (waves) that a compute unit holds at most.
    programs_per_unit: programs (workgroups of several waves) likewise.
    driver_names: parts of the names by which the driver calls cards with these peaks.
    """

    name: str
    option: str
    backend: str
    arch: str
    compute_units: int
    shared_bytes: int
    shared_bytes_per_unit: int
    warps_per_unit: int
    programs_per_unit: int
    fp16_tflops: float  # dense matrix units
    bf16_tflops: float
    fp32_tflops: float  # true float32 products: AMD's matrix units, NVIDIA's vector units
    vector_tflops: float  # float32
    bandwidth_gbps: float
    driver_names: tuple[str, ...]

    def peaks(self, dtype: torch.dtype) -> Peaks | None:
        """In float16, bfloat16 or float32; None for any other dtype."""
        rates = {
            torch.float16: self.fp16_tflops,
            torch.bfloat16: self.bf16_tflops,
            torch.float32: self.fp32_tflops,
        }
        if dtype not in rates:
            return None
        return Peaks(rates[dtype], self.vector_tflops, self.bandwidth_gbps, f"peaks of {self.name}")


# Vendors' data sheets; the H100's fp16 rate and bandwidth are what one sustained in a large product and a copy.
_KNOWN = (
    Device(
        name="MI100",
        option="mi100",
        backend="hip",
        arch="gfx908",
        compute_units=120,
        shared_bytes=65536,
        shared_bytes_per_unit=65536,
        warps_per_unit=40,
        programs_per_unit=16,
        fp16_tflops=184.6,
        bf16_tflops=92.3,
        fp32_tflops=46.1,
        vector_tflops=23.1,
        bandwidth_gbps=1229,
        driver_names=("MI100",),
    ),
    Device(
        name="MI210",  # or one die of an MI250
        option="mi210",
        backend="hip",
        arch="gfx90a",
        compute_units=104,
        shared_bytes=65536,
        shared_bytes_per_unit=65536,
        warps_per_unit=32,
        programs_per_unit=16,
        fp16_tflops=181.0,
        bf16_tflops=181.0,
        fp32_tflops=45.3,
        vector_tflops=22.6,
        bandwidth_gbps=1638,
        driver_names=("MI210",),
    ),
    Device(
        name="MI300X",
        option="mi300x",
        backend="hip",
        arch="gfx942",
        compute_units=304,
        shared_bytes=65536,
        shared_bytes_per_unit=65536,
        warps_per_unit=32,
        programs_per_unit=16,
        fp16_tflops=1307.4,
        bf16_tflops=1307.4,
        fp32_tflops=163.4,
        vector_tflops=81.7,
        bandwidth_gbps=5300,
        driver_names=("MI300X",),
    ),
    Device(
        name="A100 40GB",
        option="a100",
        backend="cuda",
        arch="sm_80",
        compute_units=108,
        shared_bytes=166912,
        shared_bytes_per_unit=167936,
        warps_per_unit=64,
        programs_per_unit=32,
        fp16_tflops=312.0,
        bf16_tflops=312.0,
        fp32_tflops=19.5,
        vector_tflops=19.5,
        bandwidth_gbps=1555,
        driver_names=("A100-SXM4-40GB", "A100-PCIE-40GB"),
    ),
    Device(
        name="H100 SXM",
        option="h100",
        backend="cuda",
        arch="sm_90",
        compute_units=132,
        shared_bytes=232448,
        shared_bytes_per_unit=233472,
        warps_per_unit=64,
        programs_per_unit=32,
        fp16_tflops=800.0,
        bf16_tflops=800.0,
        fp32_tflops=66.9,
        vector_tflops=66.9,
        bandwidth_gbps=3000,
        driver_names=("H100 80GB HBM3",),
    ),
    Device(
        name="B200",
        option="b200",
        backend="cuda",
        arch="sm_100",
        compute_units=148,
        shared_bytes=232448,
        shared_bytes_per_unit=233472,
        warps_per_unit=64,
        programs_per_unit=32,
        fp16_tflops=2250.0,
        bf16_tflops=2250.0,
        fp32_tflops=75.0,
        vector_tflops=75.0,
        bandwidth_gbps=8000,
        driver_names=("NVIDIA B200",),
    ),
    Device(
        name="RTX 5090",
        option="rtx5090",
        backend="cuda",
        arch="sm_120",
        compute_units=170,
        shared_bytes=101376,
        shared_bytes_per_unit=102400,
        warps_per_unit=48,
        programs_per_unit=24,
        fp16_tflops=209.5,  # sums in float32
        bf16_tflops=209.5,
        fp32_tflops=104.8,
        vector_tflops=104.8,
        bandwidth_gbps=1792,
        driver_names=(),  # the laptop card of that name has other peaks
    ),
)
DEVICES = {device.arch: device for device in _KNOWN}  # by architecture
OPTIONS = {device.option: device for device in _KNOWN}  # by the name on the command line


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
