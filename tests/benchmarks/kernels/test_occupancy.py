"""Whole programs a compute unit: each limit in turn."""

import pytest

from benchmarks.kernels.occupancy import amd_workgroups, nvidia_workgroups
from depthfuse.devices import DEVICES


@pytest.mark.parametrize(
    ("waves", "num_warps", "shared_bytes", "workgroups"),
    [
        (3, 4, 0, 3),
        (3, 8, 0, 1),  # 2 waves a SIMD each: the third wave of each SIMD stays empty
        (5, 8, 0, 2),
        (10, 2, 0, 16),  # the limit of workgroups, not of waves
        (10, 1, 0, 40),  # which those of one wave do not have
        (10, 4, 24576, 2),  # 2.67 by LDS
        (10, 4, 21846, 2),  # 2.9999 by LDS
        (10, 4, 21844, 2),  # LDS comes in pieces of 512 bytes
        (10, 4, 21504, 3),
        (2, 8, 65536, 1),
        (2, 8, 65537, 0),
    ],
)
def test_amd(waves, num_warps, shared_bytes, workgroups):
    assert amd_workgroups(waves, num_warps, shared_bytes, DEVICES["gfx908"]) == workgroups


@pytest.mark.parametrize(
    ("arch", "registers", "num_warps", "shared_bytes", "columns", "workgroups"),
    [
        ("sm_90", 128, 4, 0, 0, 4),
        ("sm_90", 129, 4, 0, 0, 3),  # as 136
        ("sm_90", 200, 2, 0, 0, 4),  # 2 warps of 6400 registers a partition; all four together would hold 10
        ("sm_90", 168, 8, 0, 0, 1),
        ("sm_90", 32, 4, 0, 0, 16),  # 64 warps
        ("sm_120", 32, 4, 0, 0, 12),  # 48 warps
        ("sm_90", 32, 1, 0, 0, 32),  # 32 programs
        ("sm_120", 32, 1, 0, 0, 24),
        ("sm_90", 64, 4, 57344, 0, 4),
        ("sm_90", 32, 2, 45568, 0, 5),
        ("sm_90", 32, 2, 45670, 0, 4),  # five would fit, but shared memory comes in pieces of 128 bytes
        ("sm_90", 64, 4, 58368, 0, 3),  # four are 228 KiB, but each takes 1 KiB more
        ("sm_80", 64, 4, 57216, 0, 2),
        ("sm_120", 64, 4, 57216, 0, 1),
        ("sm_120", 64, 4, 101376, 0, 1),
        ("sm_100", 64, 4, 1024, 256, 2),
        ("sm_100", 64, 4, 1024, 512, 1),
    ],
)
def test_nvidia(arch, registers, num_warps, shared_bytes, columns, workgroups):
    assert nvidia_workgroups(registers, num_warps, shared_bytes, columns, DEVICES[arch]) == workgroups
