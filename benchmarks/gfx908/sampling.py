"""A few workgroups of a launch that is too large to hold: its code and its tiles, on the tensors of batch 1."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gfx908.launches import TARGET, execute, program_of
from benchmarks.gfx908.networks import operands_of
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
        (x, _, z), (_, y, _) = (*launch.grid, 1, 1)[:3], (*plans[-1].grid, 1, 1)[:3]
        tiles = max(1, x // batch)  # of one image, where tiles go over images at all
        count = min(count, tiles)
        first = (tiles - count) // 2
        programs = [(first + n, min(y, (*launch.grid, 1)[1]) // 2, k) for n in range(count) for k in range(z)]
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
