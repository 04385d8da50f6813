"""Simulated times of the launches of real networks on the MI100: what their waves execute, through `cycles.py`.

Some workgroups of each launch are executed and their events recorded; a compute unit gets as many at once as its
registers and LDS hold, and new ones as they end, until it has had its share of the grid; beyond three rounds the time
is continued in proportion. Launches themselves cost nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gfx908.busy import CLOCK_MHZ
from benchmarks.gfx908.cycles import ComputeUnit, Parameters
from benchmarks.gfx908.launches import TARGET, program_of
from benchmarks.gfx908.sampling import sample
from benchmarks.gfx908.trace import Event, Trace
from benchmarks.gfx908.units import NetworkCase, cases_of
from benchmarks.kernels.prove import tile_of
from benchmarks.kernels.resources import key_of, resources_of
from depthfuse.devices import DEVICES
from depthfuse.kernels.launch import ceil_div

_UNITS = DEVICES["gfx908"].compute_units
_ROUNDS = 3  # that are simulated before the rest is taken in proportion
_APART = 1 << 40  # lines between the tensors of one round's workgroups and the next's

Workgroup = list[list[Event]]


@dataclass(frozen=True)
class Row:
    """One launch of a network.

    Attributes:
        plain, merged: see units.py.
        resident: workgroups that a compute unit has at once.
        simulated_us, roofline_us: of the whole launch. share: the second of the first.
        vector, matrix, lds, cache: the share of the time in which each unit is busy.
    """

    triton: str
    network: str
    batch: int
    op: str
    dtype: str
    shape: str
    tile: str
    plain: int
    merged: int
    workgroups: int
    resident: int
    simulated_us: float
    roofline_us: float
    share: float
    vector: float
    matrix: float
    lds: float
    cache: float


def workgroups_of(trace: Trace, waves: int) -> list[Workgroup]:
    """What was recorded, by workgroups of so many waves."""
    numbers = sorted(trace.waves)
    return [
        [trace.waves[n] for n in numbers[first : first + waves]] for first in range(0, len(numbers), waves)
    ]


def clocks_of(
    known: list[Workgroup], grid: int, resident: int, bytes_moved: float
) -> tuple[float, ComputeUnit]:
    """Clocks of the fullest compute unit for its share of the grid, and the unit as it is after what was simulated.

    Args:
        known: workgroups that stand for all. bytes_moved: of the launch, from and to memory.
    """
    share = ceil_div(grid, _UNITS)
    resident = min(resident, share)
    many = min(share, _ROUNDS * resident)
    touched = {line for workgroup in known for wave in workgroup for event in wave for line in event.lines}
    fresh = min(1.0, bytes_moved / 64 / grid * len(known) / max(1, len(touched)))
    active = min(grid, _UNITS)
    given = Parameters()
    parameters = replace(given, memory_bytes=min(given.second_bytes, given.memory_bytes * _UNITS / active))
    unit = ComputeUnit(parameters, fresh)
    ends = unit.run([_moved(known[n % len(known)], n // len(known)) for n in range(many)], resident)
    if share == many:
        return ends[-1], unit
    pace = (ends[-1] - ends[-1 - resident]) / resident
    return ends[-1] + (share - many) * pace, unit


def _moved(workgroup: Workgroup, by: int) -> Workgroup:
    """The same events on other memory."""
    if not by:
        return workgroup

    def elsewhere(event: Event) -> Event:
        return (
            event._replace(lines=tuple(line + by * _APART for line in event.lines)) if event.lines else event
        )

    return [[elsewhere(event) for event in wave] for wave in workgroup]


_samples: dict[str, list[Workgroup]] = {}  # by compiled code


def row_of(found: NetworkCase) -> Row:
    """Simulate the last launch of a case."""
    launch = found.launch()
    resident = resources_of(launch, TARGET).workgroups
    code = key_of(launch, TARGET)
    if code not in _samples:
        trace = Trace()
        sample(found.case, found.small, found.batch, found.dtype, resident, trace)
        _samples[code] = workgroups_of(trace, program_of(launch).kernel.waves)
    grid = torch.Size(launch.grid).numel()
    clocks, unit = clocks_of(_samples[code], grid, resident, found.bytes_moved())
    least_us = found.roofline_us()
    time_us = clocks / CLOCK_MHZ
    return Row(
        **found.facts(),
        tile=tile_of(launch),
        workgroups=grid,
        resident=resident,
        simulated_us=round(time_us, 2),
        roofline_us=round(least_us, 2),
        share=round(least_us / time_us, 3),
        **unit.shares(),
    )


def rows(networks: list[str], batches: list[int], ops: list[str] | None, dtypes: list[str]) -> Iterator[Row]:
    """Of each distinct operator of the networks."""
    return map(row_of, cases_of(networks, batches, ops, dtypes))
