"""A few workgroups of a launch that is too large to hold: its code and its tiles, on the tensors of batch 1."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gfx908.launches import TARGET, execute, program_of
from benchmarks.gfx908.networks import operands_of, parts_of
from benchmarks.gfx908.operators import DTYPES, poisoned
from benchmarks.kernels.cases import Case
from depthfuse.kernels.launch import Launch, stand_in


def sample(case: Case, small: Case, batch: int, dtype: str, count: int, watcher: object) -> int:
    """Run workgroups from the middle of the last launch of a case, with a watcher; how many.

    Args:
        small: the same operator at batch 1. batch: of `case`. count: of tiles; of a tile whose sum is split, all parts
            run. Fewer, where batch 1 has fewer.
    """
    launch, plans = case.launches(DTYPES[dtype], TARGET)[-1], []
    with stand_in(TARGET, plans.append), poisoned():
        small.ours(**operands_of(small, DTYPES[dtype]))
        splits = launch.arguments.get("SPLITS", 1)
        tiles = max(1, launch.grid[0] // batch)  # of one image, where tiles go over images at all
        count = min(count, tiles)
        first = (tiles - count) // 2
        # Images may be on the second axis, of which batch 1 has fewer.
        parts = parts_of(launch.grid if splits > 1 else plans[-1].grid, splits)
        programs = [(first + n, j, k) for n in range(count) for j, k in parts]
        execute(_on_tensors_of(launch, plans[-1]), program_of(launch), programs, watcher)
    return len(programs)


def _on_tensors_of(launch: Launch, small: Launch) -> Launch:
    """`launch` with the tensors and sizes of `small`, and its own constants."""
    arguments = dict(small.arguments)
    for parameter in launch.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            arguments[name] = launch.arguments[name]
        elif name in ("parts", "counters"):  # they go with the tiles
            own = launch.arguments[name]
            arguments[name] = None if own is None else torch.zeros_like(own, device="cpu")
    return replace(launch, arguments=arguments)
