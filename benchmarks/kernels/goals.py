"""What compiled code must not do (faults), and what will probably cost time on the card (worries)."""

import re

from benchmarks.kernels.resources import Resources
from depthfuse.kernels.launch import Target

# Those with no matrix product in them.
VECTOR_KERNELS = ("depthwise_kernel", "pool_kernel", "pool_linear_kernel")

# buffer_load_ushort, buffer_load_short_d16_hi, LDG.E.U16, LDG.E.S8
_NARROW_LOAD = re.compile(r"_[us]byte|_[us]?short|\.[US](?:8|16)\b")


def faults(resources: Resources, kernel: str, dtype: str, target: Target) -> list[str]:
    """Goals that compiled code misses.

    No spills and no private memory; shared memory within the target's limit; matrix instructions where the operator is
    a matrix product (float32 on NVIDIA has none: its true products are plain multiply-adds); no 16-bit LDS
    read in a loop; and, for those products, two waves a SIMD so that one computes while the other loads.
    """
    found = []
    if resources.spills:
        found.append("spills")
    if resources.private_bytes:
        found.append("private_memory")
    if resources.shared_bytes > target.shared_bytes:
        found.append("shared_memory")
    if resources.narrow_reads_in_loop:
        found.append("narrow_reads")
    if kernel in VECTOR_KERNELS:
        return found
    if not resources.matrix and not (target.backend == "cuda" and dtype == "fp32"):
        found.append("no_matrix_instructions")
    if resources.occupancy < 2:
        found.append("occupancy")
    return found


# Name -> what it says, in the order of the columns of a summary.
WORRIES = {
    "drained_barriers": "waves wait for all global loads before a barrier in a loop: loading ahead is void",
    "accumulator_copies": "accumulators are copied in a loop with matrix instructions",
    "vector_bound": "of a matrix product's loop, the vector unit takes longer than the matrix unit",
    "narrow_loads": "a matrix product's loop loads less than 4 bytes a lane from global memory",
    "one_workgroup": "a compute unit holds one program: nothing else runs while it waits at a barrier",
    "few_programs": "fewer programs than compute units",
}


def worries(resources: Resources, kernel: str, programs: int, target: Target) -> list[str]:
    """Names out of `WORRIES`. None of them is wrong by itself: a small tile may be worth few programs.

    Args:
        programs: of the whole launch.
    """
    product = kernel not in VECTOR_KERNELS
    found = {
        "drained_barriers": resources.drained_barriers > 0,
        "accumulator_copies": resources.accumulator_copies > 0,
        "vector_bound": product and resources.vector_clocks > resources.matrix_clocks > 0,
        "narrow_loads": product and bool(_NARROW_LOAD.search(resources.global_loads)),
        "one_workgroup": resources.workgroups == 1,
        "few_programs": programs < target.compute_units,
    }
    return [name for name in WORRIES if found[name]]
