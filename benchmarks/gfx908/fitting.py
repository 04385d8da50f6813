"""Fit the model of `kernels/device/gfx908.py` to simulated times, so that it picks the tiles that are fastest there.

    python -m benchmarks.gfx908 fit benchmarks/results/gfx908_tiles.csv

Random steps from the present constants, kept where they pick better: the ratio of what the model picks to the fastest
tile, its mean over all shapes and over the networks' layers, and, a little, how far its times are off within a shape.
"""

from __future__ import annotations

import csv
import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from depthfuse.kernels.conv2d import FLAT_BELOW
from depthfuse.kernels.device.gfx908 import COSTS, TILES, Costs, Product, Tile, clocks

_MACS, _ITEMSIZE = 512, 2  # float16
_PACE = (0.75, 1.33)
_BAD = 1.1


@dataclass(frozen=True)
class Measured:
    """One tile of one shape. weight: layers of the networks that are this shape."""

    tile: tuple[int, int, int, int]
    splits: int
    simulated_us: float
    weight: int
    chosen: bool


@dataclass(frozen=True)
class Quality:
    """Ratios of what is picked to the fastest: geometric mean over shapes, and of the layers' sums; off: mean error
    within a shape."""

    mean: float
    layers: float
    off: float

    def value(self) -> float:
        return self.mean + self.layers + 0.3 * self.off


Shapes = dict[tuple[Product, str], list[Measured]]  # by product and, as tails differ, all of the shape


def read(path: Path, batches: Iterable[str] | None = None) -> Shapes:
    """The shapes of a CSV of `tiles`, in float16; the fastest of equal rows of several networks."""
    shapes: Shapes = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            product = _product(row) if row["op"] in ("conv2d", "linear") else None
            if product is None or row["dtype"] != "fp16" or (batches and row["batch"] not in batches):
                continue
            config = fields_of(row["config"])
            tile = tuple(config[name] for name in ("block_m", "block_n", "block_k", "num_warps"))
            weight = int(row["plain"]) + int(row["merged"])
            time_us = float(row["simulated_us"])
            measured = Measured(tile, config["splits"], time_us, weight, row["chosen"] == "True")
            shapes[product, row["shape"]].append(measured)
    return {key: found for key, found in shapes.items() if len(found) > 2}


def fields_of(config: str) -> dict[str, int]:
    """Of a configuration as `tiles.Row` has it."""
    return {name: int(value) for name, value in (part.split("=") for part in config.split())}


def _product(row: dict[str, str]) -> Product | None:
    sizes = dict(part.split("=") for part in row["shape"].split())
    columns = int(sizes["out_channels"])
    if row["op"] == "linear":
        return Product(int(sizes["rows"]), columns, int(sizes["channels"]), 1, 1, _MACS, _ITEMSIZE)
    channels, kernel, stride = (int(sizes[name]) for name in ("channels", "kernel", "stride"))
    if channels < FLAT_BELOW and kernel > 1:
        return None
    out = (int(sizes["size"]) + 2 * int(sizes["padding"]) - kernel) // stride + 1
    return Product(int(sizes["batch"]) * out * out, columns, channels, kernel * kernel, 1, _MACS, _ITEMSIZE)


def quality(shapes: Shapes, tiles: tuple[Tile, ...], costs: Costs) -> Quality:
    by_size = {(t.block_m, t.block_n, t.block_k, t.num_warps): t for t in tiles}
    logs, errors, picked_us, least_us = [], [], 0.0, 0.0
    for (product, _), found in shapes.items():
        mine = [(clocks(product, by_size[m.tile], m.splits, costs), m) for m in found if m.tile in by_size]
        if not mine:
            continue
        picked = min(mine, key=lambda pair: pair[0])[1]
        least = min(m.simulated_us for m in found)
        weight = max(m.weight for m in found)
        logs.append(math.log(picked.simulated_us / least))
        picked_us += weight * picked.simulated_us
        least_us += weight * least
        off = [math.log(time / m.simulated_us) for time, m in mine]
        middle = sorted(off)[len(off) // 2]
        errors.append(sum(abs(o - middle) for o in off) / len(off))
    return Quality(math.exp(sum(logs) / len(logs)), picked_us / least_us, sum(errors) / len(errors))


def fit(
    shapes: Shapes, tiles: tuple[Tile, ...], costs: Costs, steps: int, seed: int = 0
) -> tuple[tuple[Tile, ...], Costs, Quality]:
    """Better constants. The second cache's rate stays: it was measured by others on the card."""
    rng = random.Random(seed)
    best = quality(shapes, tiles, costs)
    for _ in range(steps):
        values = [v * math.exp(rng.gauss(0, 0.12)) if rng.random() < 0.4 else v for v in astuple(costs)]
        tried_costs = replace(Costs(*values), second_bytes=costs.second_bytes)
        tried = list(tiles)
        if rng.random() < 0.5:
            index = rng.randrange(len(tried))
            pace = min(max(tried[index].pace * math.exp(rng.gauss(0, 0.08)), _PACE[0]), _PACE[1])
            resident = max(1, tried[index].resident + rng.choice((-1, 0, 0, 1)))
            tried[index] = replace(tried[index], pace=round(pace, 3), resident=resident)
        found = quality(shapes, tuple(tried), tried_costs)
        if found.value() < best.value():
            tiles, costs, best = tuple(tried), tried_costs, found
    return tiles, costs, best


def report(path: Path, steps: int, seed: int) -> str:
    """Fit to a CSV of `tiles`; the constants in words to copy, and what they pick badly."""
    shapes = read(path)
    before = quality(shapes, TILES, COSTS)
    tiles, costs, after = fit(shapes, TILES, COSTS, steps, seed)
    lines = [f"{len(shapes)} shapes", f"before: {before}", f"after:  {after}", f"{costs}", *map(str, tiles)]
    by_size = {(t.block_m, t.block_n, t.block_k, t.num_warps): t for t in tiles}
    for (product, shape), found in shapes.items():
        mine = [m for m in found if m.tile in by_size]
        picked = min(mine, key=lambda m: clocks(product, by_size[m.tile], m.splits, costs))
        least = min(found, key=lambda m: m.simulated_us)
        ratio = picked.simulated_us / least.simulated_us
        if ratio > _BAD:
            tiles_named = f"{picked.tile} in {picked.splits}, not {least.tile} in {least.splits}"
            lines.append(f"{ratio:.2f} times the fastest: {tiles_named}: {shape}")
    return "\n".join(lines)
