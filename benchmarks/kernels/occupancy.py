"""How many programs of a kernel a compute unit holds at once. They come whole: one that does not fit waits.

AMD: LLVM says how many waves the registers of a SIMD hold; a unit has four. NVIDIA: CUDA's occupancy calculator.
"""

from depthfuse.devices import Device

SIMDS = 4  # of a compute unit; a multiprocessor has as many partitions
_LDS_GRANULARITY = 512  # bytes
_REGISTERS_PER_PARTITION = 16384
_REGISTER_GRANULARITY = 256  # a warp's registers, so 8 a thread
_SHARED_GRANULARITY = 128  # bytes
_RESERVED_SHARED = 1024  # bytes of each program, for the system
_TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor from sm_100 on


def amd_workgroups(waves_per_simd: int, num_warps: int, shared_bytes: int, device: Device) -> int:
    """Workgroups of `num_warps` waves that a compute unit holds.

    Args:
        waves_per_simd: that the registers allow.
    """
    limits = [SIMDS * waves_per_simd // num_warps]
    if num_warps > 1:  # a single wave needs no barrier, of which a unit has so many
        limits.append(device.programs_per_unit)
    if shared_bytes:
        limits.append(device.shared_bytes_per_unit // _up(shared_bytes, _LDS_GRANULARITY))
    return min(limits)


def nvidia_workgroups(
    registers: int, num_warps: int, shared_bytes: int, tensor_columns: int, device: Device
) -> int:
    """Programs of `num_warps` warps with `registers` a thread that a multiprocessor holds.

    Args:
        tensor_columns: columns of tensor memory of a program (sm_100), else 0.
    """
    warps = SIMDS * (_REGISTERS_PER_PARTITION // _up(32 * registers, _REGISTER_GRANULARITY))
    limits = [
        device.programs_per_unit,
        min(warps, device.warps_per_unit) // num_warps,
        device.shared_bytes_per_unit // _up(shared_bytes + _RESERVED_SHARED, _SHARED_GRANULARITY),
    ]
    if tensor_columns:
        limits.append(_TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(limits)


def _up(size: int, granularity: int) -> int:
    return -(-size // granularity) * granularity
