"""Which configuration of a launch the model of the MI100 finds fastest: what the choices for gfx908 are fitted to.

Launches of real networks in the heuristic's configuration and in others, simulated as in `times.py`: matrix products
at each of a list of tiles, the rest at those that a measurement on a GPU would try. Of launches that ask for the same
configuration, as those that differ in their tails alone do, the first. Configurations that spill, or do not fit into
LDS, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gfx908.launches import TARGET
from benchmarks.gfx908.network_cases import LaunchRow, NetworkCase, cases_of
from benchmarks.gfx908.times import cache_of_times, simulated
from benchmarks.kernels.resources import Resources, resources_of
from depthfuse.kernels.conv2d import FLAT_BELOW
from depthfuse.kernels.device.gfx908 import TILES
from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.launch import REORDERED, ceil_div
from depthfuse.kernels.tuning.lookup import Request, session
from depthfuse.kernels.tuning.space import candidates

_SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row(LaunchRow):
    """One launch in one configuration.

    Attributes:
        request: as `lookup.Request.key` names it. config: its fields.
        chosen: whether it is the heuristic's. The others are as in `times.Row`.
    """

    request: str
    config: str
    chosen: bool
    workgroups: int
    resident: int
    registers: int
    simulated_us: float
    roofline_us: float
    share: float
    vector: float
    matrix: float
    lds: float
    cache: float


def rows(networks: list[str], batches: list[int], ops: list[str] | None, dtypes: list[str]) -> Iterator[Row]:
    """Each launch in each configuration. A run that was stopped goes on where it was."""
    cache, asked = cache_of_times(), set()
    for found in cases_of(networks, batches, ops, dtypes):
        with session() as watch:
            found.launch()
            request = next(iter(watch.seen), None)  # none where a configuration is placed by hand
            if request is None or request in asked:
                continue
            asked.add(request)
            for config in dict.fromkeys((request.heuristic, *_tried(request))):
                watch.forced[request] = config
                resources = resources_of(found.launch(), TARGET)
                if not resources.spills and resources.workgroups:
                    yield _row(found, request, config, simulated(found, cache), resources)


def _tried(request: Request) -> Iterator[Any]:
    """Tiles that are not much larger than the product; parts of its sum only where tiles leave compute units idle."""
    if not isinstance(request.heuristic, GemmConfig):
        yield from candidates(request)
        return
    shape, halves = dict(request.shape), request.dtype.itemsize == 2
    taps, channels = shape.get("taps", 1), shape["channels"]
    if channels < FLAT_BELOW and taps > 1:
        return  # steps of the flat axis are placed by hand
    rows, columns = shape.get("rows") or shape["pixels"], shape["out_channels"]
    for tile in TILES:
        sizes = tile.block_m, tile.block_n, tile.block_k
        if any(
            size >= 2 * max(32, whole) for size, whole in zip(sizes, (rows, columns, channels), strict=True)
        ):
            continue
        programs = ceil_div(rows, tile.block_m) * ceil_div(columns, tile.block_n) * shape.get("groups", 1)
        nonkdim = 32 if halves or tile.block_m * tile.block_n >= 64 * 64 else 16
        for splits in _SPLITS:
            steps = taps * ceil_div(channels, tile.block_k)
            if splits > 1 and (programs * splits > 2 * request.target.compute_units or steps < 2 * splits):
                break
            kpack = 2 if halves else 1
            yield GemmConfig(*sizes, 8, tile.num_warps, 2, splits, nonkdim, kpack, REORDERED)


def _row(
    found: NetworkCase, request: Request, config: Any, answer: dict[str, float], resources: Resources
) -> Row:
    least_us = found.roofline_us()
    return Row(
        **found.facts(),
        request=request.key(),
        config=" ".join(f"{name}={value}" for name, value in asdict(config).items()),
        chosen=config == request.heuristic,
        workgroups=torch.Size(found.launch().grid).numel(),
        resident=resources.workgroups,
        registers=resources.registers,
        roofline_us=round(least_us, 2),
        share=round(least_us / answer["simulated_us"], 3),
        **answer,
    )
