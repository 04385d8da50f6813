"""For the launches of real networks: which unit of a compute unit their code keeps busy longest, and for how long.

*Simulated* from counts, without latencies (see busy.py): a time below which the compiled code cannot go, beside the
roofline, below which the device cannot go. Where the first is much above the second, instructions other than the
products cost the time, or LDS does, however well waits are hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gfx908.busy import CLOCK_MHZ, UNITS, Busy
from benchmarks.gfx908.launches import TARGET, program_of
from benchmarks.gfx908.network_cases import LaunchRow, NetworkCase, cases_of
from benchmarks.gfx908.sampling import sample
from benchmarks.kernels.prove import tile_of
from benchmarks.kernels.resources import key_of
from depthfuse.devices import DEVICES
from depthfuse.kernels.launch import ceil_div

_DEVICE = DEVICES["gfx908"]


@dataclass(frozen=True)
class Row(LaunchRow):
    """One launch of a network.

    Attributes:
        executed: instructions of one workgroup, all its waves.
        vector, matrix, scalar, lds, cache: clocks that each unit is busy with one workgroup, the waves spread evenly
            over the four SIMDs.
        lds_conflicts: LDS's clocks as a multiple of those without conflicts; 0 where LDS is not used.
        busiest: the unit that is busy longest, or "memory".
        bound_us: of the whole launch: that unit's clocks times the workgroups of the fullest compute unit, or the
            roofline where that is longer.
        share: roofline_us of bound_us.
    """

    tile: str
    workgroups: int
    waves: int
    executed: int
    vector: int
    matrix: int
    scalar: int
    lds: int
    cache: int
    lds_conflicts: float
    busiest: str
    bound_us: float
    roofline_us: float
    share: float


_counts: dict[str, tuple[Busy, int]] = {}  # by compiled code: of how many workgroups


def row_of(found: NetworkCase) -> Row:
    """Count the last launch of a case."""
    launch = found.launch()
    code = key_of(launch, TARGET)
    if code not in _counts:
        busy = Busy()
        _counts[code] = (busy, sample(found, 1, busy))
    busy, parts = _counts[code]
    grid = torch.Size(launch.grid).numel()
    clocks = {unit: value / parts for unit, value in busy.of_a_workgroup().items()}
    busiest = max(clocks, key=clocks.get)
    bound_us = clocks[busiest] * ceil_div(grid, _DEVICE.compute_units) / CLOCK_MHZ
    least_us = found.roofline_us()
    return Row(
        **found.facts(),
        tile=tile_of(launch),
        workgroups=grid,
        waves=program_of(launch).kernel.waves,
        executed=busy.executed // parts,
        **{unit: round(clocks[unit]) for unit in UNITS},
        lds_conflicts=round(busy.clocks["lds"] / busy.least_lds, 2) if busy.least_lds else 0.0,
        busiest=busiest if bound_us >= least_us else "memory",
        bound_us=round(max(bound_us, least_us), 2),
        roofline_us=round(least_us, 2),
        share=round(least_us / max(bound_us, least_us), 3),
    )


def rows(networks: list[str], batches: list[int], ops: list[str] | None, dtypes: list[str]) -> Iterator[Row]:
    """Of each distinct operator of the networks. The same code is counted once."""
    return map(row_of, cases_of(networks, batches, ops, dtypes))
