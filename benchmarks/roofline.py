"""The time below which no kernel can go on a device: arithmetic at full rate, or each byte moved once."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Published peaks of one device (of one die, where a card has two)."""

    name: str
    fp16_tflops: float  # dense matrix units
    bf16_tflops: float
    fp32_tflops: float  # true float32 products: AMD's matrix units, NVIDIA's vector units
    vector_tflops: float  # float32 multiply-adds outside the matrix units, which depthwise convolution uses
    bandwidth_gbps: float


# Vendors' data sheets; the H100's fp16 rate and bandwidth are what one sustained in a large product and a copy.
DEVICES = {
    "gfx908": Device("MI100", 184.6, 92.3, 46.1, 23.1, 1229),
    "gfx90a": Device("MI210", 181.0, 181.0, 45.3, 22.6, 1638),
    "gfx942": Device("MI300X", 1307.4, 1307.4, 163.4, 81.7, 5300),
    "sm_80": Device("A100 40GB", 312.0, 312.0, 19.5, 19.5, 1555),
    "sm_90": Device("H100 SXM", 800.0, 800.0, 66.9, 66.9, 3000),
}


def roofline_us(arch: str, flops: float, bytes_moved: float, dtype: torch.dtype, matrix: bool) -> float:
    """Microseconds that `flops` (a multiply-add is 2) and `bytes_moved` take at least on `arch`.

    Args:
        matrix: whether the matrix units can do the arithmetic.
    """
    device = DEVICES[arch]
    rates = {
        torch.float16: device.fp16_tflops,
        torch.bfloat16: device.bf16_tflops,
        torch.float32: device.fp32_tflops,
    }
    tflops = rates[dtype] if matrix else device.vector_tflops
    return max(flops / tflops / 1e6, bytes_moved / device.bandwidth_gbps / 1e3)
