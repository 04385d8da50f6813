"""A few workgroups of a launch that is too large to hold: its code and its tiles, on the tensors of a few images."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gfx908.launches import TARGET, execute, program_of
from benchmarks.gfx908.network_cases import NetworkCase
from benchmarks.gfx908.networks import operands_of, parts_of
from benchmarks.gfx908.operators import DTYPES, poisoned
from depthfuse.devices import DEVICES
from depthfuse.kernels.launch import Launch, stand_in

_UNITS = DEVICES["gfx908"].compute_units
_MOST_ELEMENTS = 2e7  # of the tensors that a few workgroups run on


def sample(found: NetworkCase, count: int, watcher: object) -> int:
    """Run workgroups from the middle of the last launch of a case, with a watcher; how many.

    Args:
        count: of tiles; of a tile whose sum is split, all parts run. Fewer, where few images have fewer.
    """
    launch, plans = found.launch(), []
    images = _images(found, launch, count)
    few = found.small[images]
    with stand_in(TARGET, plans.append), poisoned():
        few.ours(**operands_of(few, DTYPES[found.dtype]))
        splits = launch.arguments.get("SPLITS", 1)
        tiles = max(1, launch.grid[0] * images // found.batch)
        count = min(count, tiles)
        step = max(1, min(_UNITS, tiles // count))
        first = (tiles - (count - 1) * step) // 2
        # Images may be on the second axis, of which few have fewer.
        parts = parts_of(launch.grid if splits > 1 else plans[-1].grid, splits)
        programs = [(first + n * step, j, k) for n in range(count) for j, k in parts]
        execute(_on_tensors_of(launch, plans[-1]), program_of(launch), programs, watcher)
    return len(programs)


def _images(found: NetworkCase, launch: Launch, count: int) -> int:
    """So many that `count` programs are as far apart as those that one compute unit has at once, which are dealt out to
    all units in turn: neighbours would share more lines of the first cache. At least, as many as can be held: rows past
    the end of a tile read the last one again, which costs less than rows of their own. And as many as that the same
    kernel runs: the batch may choose it.
    """
    alike = {
        images: case
        for images, case in found.small.items()
        if case.launches(DTYPES[found.dtype], TARGET)[-1].kernel is launch.kernel
    }
    programs, largest = launch.grid[0], min(alike)
    for images, case in alike.items():
        if images > largest and case.elements_moved() > _MOST_ELEMENTS:
            break
        largest = images
        if programs * images > (count - 1) * _UNITS * found.batch:
            break
    return largest


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
