"""Which tile of a matrix product the model of the MI100 finds fastest: what the heuristic of `tile.py` is fitted to.

Convolutions and linear layers of real networks, at the heuristic's tile and at each of a list, simulated as in
`times.py`; of those that differ in their tails alone, which ask for the same tile, the first. Tiles that spill, or do
not fit into LDS, are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gfx908.launches import TARGET
from benchmarks.gfx908.network_cases import NetworkCase, cases_of
from benchmarks.gfx908.times import cache_of_times, simulated
from benchmarks.kernels.resources import Resources, resources_of
from depthfuse.kernels.conv2d import FLAT_BELOW
from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.launch import REORDERED, ceil_div
from depthfuse.kernels.tuning.lookup import Request, session

OPS = ("conv2d", "linear")
# (block_m, block_n, num_warps); each with steps of 32 and 64.
_TILES = (
    (256, 128, 8),
    (128, 128, 8),
    (128, 128, 4),
    (128, 64, 4),
    (64, 128, 4),
    (128, 32, 4),
    (64, 64, 4),
    (64, 64, 2),
    (64, 32, 2),
    (32, 64, 2),
    (32, 32, 1),
)
_STEPS = (32, 64)
_SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    """One launch at one tile.

    Attributes:
        chosen: whether it is the heuristic's. The others are as in `times.Row`.
    """

    triton: str
    network: str
    batch: int
    op: str
    dtype: str
    shape: str
    plain: int
    merged: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    nonkdim: int
    splits: int
    chosen: bool
    workgroups: int
    resident: int
    registers: int
    accumulator_copies: int
    simulated_us: float
    roofline_us: float
    share: float
    vector: float
    matrix: float
    lds: float
    cache: float


def rows(networks: list[str], batches: list[int], ops: list[str] | None, dtypes: list[str]) -> Iterator[Row]:
    """Each operator at each tile. A run that was stopped goes on where it was."""
    cache, asked = cache_of_times(), set()
    for found in cases_of(networks, batches, [op for op in OPS if ops is None or op in ops], dtypes):
        with session() as watch:
            found.launch()
            request = next(iter(watch.seen), None)  # none where a tile is placed by hand
            if request is None or request in asked:
                continue
            asked.add(request)
            for config in dict.fromkeys((request.heuristic, *_candidates(request))):
                watch.forced[request] = config
                resources = resources_of(found.launch(), TARGET)
                if resources.spills or not resources.workgroups:
                    continue
                yield _row(found, config, config == request.heuristic, simulated(found, cache), resources)


def _candidates(request: Request) -> Iterator[GemmConfig]:
    """Tiles that are not much larger than the product; parts of its sum only where tiles leave compute units idle."""
    shape, halves = dict(request.shape), request.dtype.itemsize == 2
    taps, channels = shape.get("taps", 1), shape["channels"]
    if channels < FLAT_BELOW and taps > 1:
        return  # steps of the flat axis are placed by hand
    rows, columns = shape.get("rows") or shape["pixels"], shape["out_channels"]
    for (block_m, block_n, num_warps), block_k in itertools.product(_TILES, _STEPS if halves else _STEPS[:1]):
        if (
            block_m >= 2 * max(32, rows)
            or block_n >= 2 * max(32, columns)
            or block_k >= 2 * max(32, channels)
        ):
            continue
        programs = ceil_div(rows, block_m) * ceil_div(columns, block_n) * shape.get("groups", 1)
        wide = halves or block_m * block_n >= 64 * 64
        for splits in _SPLITS:
            steps = taps * ceil_div(channels, block_k)
            if splits > 1 and (programs * splits > 2 * request.target.compute_units or steps < 2 * splits):
                break
            yield GemmConfig(
                block_m,
                block_n,
                block_k,
                8,
                num_warps,
                2,
                splits,
                32 if wide else 16,
                2 if halves else 1,
                REORDERED,
            )


def _row(
    found: NetworkCase, config: GemmConfig, chosen: bool, answer: dict[str, float], resources: Resources
) -> Row:
    names = ("block_m", "block_n", "block_k", "num_warps", "nonkdim", "splits")
    least_us = found.roofline_us()
    return Row(
        **found.facts(),
        **{name: getattr(config, name) for name in names},
        chosen=chosen,
        workgroups=torch.Size(found.launch().grid).numel(),
        resident=resources.workgroups,
        registers=resources.registers,
        accumulator_copies=resources.accumulator_copies,
        roofline_us=round(least_us, 2),
        share=round(least_us / answer["simulated_us"], 3),
        **answer,
    )
