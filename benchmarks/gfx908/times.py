"""Simulated times of the launches of real networks on the MI100: what their waves execute, through `cycles.py`.

Some workgroups of each launch are executed and their events recorded; a compute unit gets as many at once as its
registers and LDS hold, and new ones as they end, until it has had its share of the grid; beyond three rounds the time
is continued in proportion. Launches themselves cost nothing here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from benchmarks.gfx908.busy import CLOCK_MHZ
from benchmarks.gfx908.cycles import ComputeUnit, Parameters
from benchmarks.gfx908.launches import TARGET, program_of
from benchmarks.gfx908.network_cases import LaunchRow, NetworkCase, cases_of
from benchmarks.gfx908.sampling import sample
from benchmarks.gfx908.trace import Event, Trace
from benchmarks.kernels.prove import tile_of
from benchmarks.kernels.resources import key_of, resources_of
from depthfuse.devices import DEVICES
from depthfuse.kernels.launch import ceil_div
from depthfuse.measured_cache import MeasuredCache

_UNITS = DEVICES["gfx908"].compute_units
_ROUNDS = 3  # that are simulated before the rest is taken in proportion
_AROUND = (
    "__main__",
    "models",
    "planted",
    "tables",
    "tiles",
    "units",
    "validation",
)  # modules that decide no time
_APART = 1 << 40  # lines between the tensors of one round's workgroups and the next's

Workgroup = list[list[Event]]


@dataclass(frozen=True)
class Row(LaunchRow):
    """One launch of a network.

    Attributes:
        resident: workgroups that a compute unit has at once.
        kind: "matrix" or "vector": which units do the arithmetic. flops, bytes_moved: what the roofline is made of.
        simulated_us, roofline_us: of the whole launch. share: the second of the first.
        vector, matrix, lds, cache: the share of the time in which each unit is busy.
    """

    tile: str
    workgroups: int
    resident: int
    kind: str
    flops: float
    bytes_moved: int
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
    parameters = Parameters().shared_by(min(grid, _UNITS))
    unit = ComputeUnit(parameters, fresh)
    least = bytes_moved / grid * share / parameters.memory_bytes  # stores that were put off included
    ends = unit.run([_moved(known[n % len(known)], n // len(known)) for n in range(many)], resident)
    pace = (ends[-1] - ends[-1 - resident]) / resident if share > many else 0.0
    return max(least, ends[-1] + (share - many) * pace), unit


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


def simulated_us(found: NetworkCase) -> tuple[float, ComputeUnit]:
    """The time of the last launch of a case, and a compute unit as it is after what was simulated."""
    launch = found.launch()
    resident = resources_of(launch, TARGET).workgroups
    code = key_of(launch, TARGET)
    if code not in _samples:
        trace = Trace()
        sample(found, resident, trace)
        _samples[code] = workgroups_of(trace, program_of(launch).kernel.waves)
    grid = torch.Size(launch.grid).numel()
    clocks, unit = clocks_of(_samples[code], grid, resident, found.bytes_moved())
    return clocks / CLOCK_MHZ, unit


def simulated(found: NetworkCase, cache: MeasuredCache) -> dict[str, float]:
    """`simulated_us` of a case's last launch and `ComputeUnit.shares`; from the cache where they are known."""
    question = {
        "simulated": key_of(found.launch(), TARGET),
        "shape": found.case.shape(),
        "op": found.case.op,
    }
    answer = cache.get(question)
    if answer is None:
        time_us, unit = simulated_us(found)
        answer = {"simulated_us": round(time_us, 2), **unit.shares()}
        cache.put(question, answer)
    return answer


def row_of(found: NetworkCase, cache: MeasuredCache) -> Row:
    """Simulate the last launch of a case."""
    launch = found.launch()
    answer = simulated(found, cache)
    least_us = found.roofline_us()
    return Row(
        **found.facts(),
        tile=tile_of(launch),
        workgroups=torch.Size(launch.grid).numel(),
        resident=resources_of(launch, TARGET).workgroups,
        kind="matrix" if found.case.matrix else "vector",
        flops=found.case.flops(),
        bytes_moved=found.bytes_moved(),
        roofline_us=round(least_us, 2),
        share=round(least_us / answer["simulated_us"], 3),
        **answer,
    )


def cache_of_times() -> MeasuredCache:
    """What was simulated before, by this folder's modules as they are now."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        if module.stem not in _AROUND:
            digest.update(module.read_bytes())
    return MeasuredCache({"triton": triton.__version__, "simulated by": digest.hexdigest()[:16]})


def rows(networks: list[str], batches: list[int], ops: list[str] | None, dtypes: list[str]) -> Iterator[Row]:
    """Of each distinct operator of the networks. A run that was stopped goes on where it was."""
    cache = cache_of_times()
    return (row_of(found, cache) for found in cases_of(networks, batches, ops, dtypes))
