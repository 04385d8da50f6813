"""Starts workgroups as the hardware would: registers, argument segment, and a few workgroups at a time.

AMDGPU backend of LLVM, "Initial Kernel Execution State" and "Code Object V5 Metadata".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.gfx908.assembly import SCALAR, Argument
from benchmarks.gfx908.faults import Unsupported
from benchmarks.gfx908.machine import Machine, Program
from benchmarks.gfx908.memory import Memory
from benchmarks.gfx908.waves import LANES, Waves

ARGUMENTS = "arguments"  # the argument segment's block of memory
_TOGETHER = 64  # waves that run side by side: enough for numpy, few enough for the caches

Workgroup = tuple[int, int, int]


def hidden_values(grid: Workgroup, waves: int, lds_bytes: int) -> dict[str, int]:
    """What the runtime adds to the arguments: how large the launch is."""
    values = {"hidden_grid_dims": 3, "hidden_dynamic_lds_size": lds_bytes}
    for axis, blocks, threads in zip("xyz", grid, (waves * LANES, 1, 1), strict=True):
        values |= {f"hidden_block_count_{axis}": blocks, f"hidden_group_size_{axis}": threads}
        values |= {f"hidden_remainder_{axis}": 0, f"hidden_global_offset_{axis}": 0}
    return values


def argument_segment(
    arguments: Sequence[Argument], values: Sequence[bytes], hidden: dict[str, int] | None = None
) -> np.ndarray:
    """The values in their places, as bytes, and the hidden ones by their kind; arguments beyond them (Triton's scratch
    pointers) are 0.

    Raises:
        Unsupported: a value that has not its argument's size, or an argument of a kind that is not modelled.
    """
    segment = np.zeros(max((a.offset + a.size for a in arguments), default=0), np.uint8)
    hidden = hidden or {}
    for argument in arguments:
        if argument.kind in ("global_buffer", "by_value"):
            continue
        if argument.kind not in hidden:
            raise Unsupported(f"a kernel's argument of kind {argument.kind} is not modelled")
        octets = hidden[argument.kind].to_bytes(argument.size, "little")
        segment[argument.offset : argument.offset + argument.size] = np.frombuffer(octets, np.uint8)
    for argument, value in zip(arguments, values, strict=False):
        if len(value) != argument.size:
            raise Unsupported(f"an argument of {argument.size} bytes was given {len(value)}")
        segment[argument.offset : argument.offset + argument.size] = np.frombuffer(value, np.uint8)
    return segment


def run(
    program: Program,
    memory: Memory,
    grid: Workgroup,
    workgroups: Iterable[Workgroup] | None = None,
    watcher: object = None,
) -> None:
    """Run a kernel: these workgroups of a grid, or all.

    Args:
        memory: with a block called ARGUMENTS.
        watcher: see `Machine`.

    Raises:
        Fault: see faults.py. Unsupported.
    """
    x, y, z = grid
    if workgroups is None:
        workgroups = ((i, j, k) for k in range(z) for j in range(y) for i in range(x))
    workgroups, waves = list(workgroups), program.kernel.waves
    together = max(1, _TOGETHER // waves)
    for first in range(0, len(workgroups), together):
        some = workgroups[first : first + together]
        machine = Machine(program, memory, len(some))
        machine.watcher = watcher
        machine.run(start(machine, some, grid))


def start(machine: Machine, workgroups: Sequence[Workgroup], grid: Workgroup) -> Waves:
    """All waves of these workgroups, at the kernel's first instruction."""
    program, settings = machine.program, machine.program.kernel.settings
    per_workgroup, count = program.kernel.waves, len(workgroups)
    workgroup = np.repeat(np.arange(count), per_workgroup)
    wave = np.tile(np.arange(per_workgroup), count)
    waves = Waves(machine, program.vectors, program.accumulators, workgroup, wave)
    positions = np.array(workgroups, np.int64)[workgroup]
    waves.ids = ((positions @ np.array([1, grid[0], grid[0] * grid[1]])) * per_workgroup + wave).astype(
        np.int32
    )
    waves.v[0] = wave[:, None] * LANES + np.arange(LANES)
    waves.define(0)
    if settings.get("user_sgpr_kernarg_segment_ptr"):
        at = 4 if settings.get("user_sgpr_private_segment_buffer") else 0
        waves.s64[:, at // 2] = machine.memory.address(ARGUMENTS)
        waves.define(SCALAR + at, 2)
    number = settings.get("user_sgpr_count", 0)
    for axis, name in enumerate("xyz"):
        if settings.get(f"system_sgpr_workgroup_id_{name}"):
            waves.s[:, number] = positions[:, axis]
            waves.define(SCALAR + number)
            number += 1
    return waves
