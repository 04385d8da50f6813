"""Tiles of 16-bit matrix products on the MI100, by a model of a program's time there.

No MI100 was at hand. The model is fitted to times of the compiled code in a simulation of a compute unit
(`python -m benchmarks.gfx908 tiles`, then `fit`); how far that agrees with published figures stands in
benchmarks/gfx908/README.md. What it knows and the one of other cards (`tile.py`) does not: the second cache gives each
of 120 busy compute units some 15 bytes a clock, so that narrow tiles wait for it; and what a program does before and
after its products is hidden by other programs alone, of which large tiles leave room for few.
"""

import functools
import itertools
from dataclasses import dataclass

from depthfuse.kernels.launch import ceil_div


@dataclass(frozen=True)
class Tile:
    """A tile, and how it runs.

    Attributes:
        block_m, block_n, block_k, num_warps: see `GemmConfig`.
        resident: programs that a compute unit holds at once, where the tail needs no more registers than the products.
        pace: the model's times are multiplied by it: what it does not see of the code for this tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    resident: int
    pace: float


@dataclass(frozen=True)
class Costs:
    """What the model is made of, in clocks of a compute unit.

    Attributes:
        second_bytes: that the second cache gives in a clock, and takes.
        step: latency of a step, from its loads to its products.
        program: of a program beside its steps: addresses, first loads, last stores.
        output, loaded: vector instructions, by element of the result and of the operands.
    """

    second_bytes: float
    step: float
    program: float
    output: float
    loaded: float


@dataclass(frozen=True)
class Product:
    """y [m, n] = a [m, k] b [k, n], `groups` times, the sum being `taps` pieces of depth k; `macs`: multiply-adds a
    clock of a compute unit; `itemsize`: bytes of an element."""

    m: int
    n: int
    k: int
    taps: int
    groups: int
    macs: int
    itemsize: int


# By `python -m benchmarks.gfx908 fit benchmarks/results/gfx908_tiles.csv`.
TILES = (
    Tile(256, 128, 64, 8, 1, 1.0),
    Tile(128, 128, 64, 8, 2, 0.985),
    Tile(128, 128, 64, 4, 4, 1.003),
    Tile(128, 128, 32, 4, 2, 0.917),
    Tile(128, 128, 32, 8, 2, 0.972),
    Tile(128, 64, 64, 4, 2, 0.993),
    Tile(128, 64, 32, 4, 3, 0.993),
    Tile(64, 128, 32, 4, 6, 1.005),
    Tile(128, 32, 64, 4, 3, 1.041),
    Tile(128, 32, 32, 4, 4, 1.082),
    Tile(64, 64, 64, 4, 4, 0.932),
    Tile(64, 64, 32, 4, 4, 0.862),
    Tile(32, 64, 32, 2, 11, 0.832),
    Tile(32, 64, 64, 2, 7, 1.001),
    Tile(32, 32, 32, 1, 16, 0.827),
    Tile(32, 32, 64, 1, 7, 0.876),
)
COSTS = Costs(second_bytes=15.0, step=814.0, program=2598.0, output=1.194, loaded=0.0978)

_SPLITS = (1, 2, 4, 8)
_UNITS = 120
_SIMDS = 4


@functools.cache
def fastest(product: Product) -> tuple[Tile, int]:
    """The tile, and into how many parts the sum is cut: more than one only where tiles leave compute units idle."""
    choices = [
        (tile, splits)
        for tile, splits in itertools.product(TILES, _SPLITS)
        if splits == 1 or programs(product, tile, splits) <= 2 * _UNITS
    ]
    return min(choices, key=lambda choice: clocks(product, *choice, COSTS))


def programs(product: Product, tile: Tile, splits: int) -> int:
    """How many there are."""
    rows, columns = ceil_div(product.m, tile.block_m), ceil_div(product.n, tile.block_n)
    return rows * columns * product.groups * splits


def clocks(product: Product, tile: Tile, splits: int, costs: Costs) -> float:
    """How long the product takes, by the model, its sum cut into `splits` parts."""
    many = programs(product, tile, splits)
    busiest = ceil_div(many, _UNITS)  # programs of the fullest compute unit
    resident = min(tile.resident, busiest)
    steps = ceil_div(product.taps * ceil_div(product.k, tile.block_k), splits)
    outputs = tile.block_m * tile.block_n
    loaded = (tile.block_m + tile.block_n) * tile.block_k
    products = outputs * tile.block_k / product.macs
    # Of the second cache and of memory few units that are busy have more each, up to a line a clock.
    second_bytes = min(64.0, costs.second_bytes * _UNITS / min(many, _UNITS))
    stored = outputs * (product.itemsize if splits == 1 else 4)
    idle = min(1.0, tile.num_warps * resident / _SIMDS)
    each = steps * (costs.step + products * _SIMDS / max(_SIMDS, tile.num_warps)) + costs.program
    time = (
        busiest * steps * products / idle
        + busiest * (steps * loaded * product.itemsize + stored) / second_bytes
        + busiest * (outputs * costs.output + steps * loaded * costs.loaded) / idle
        + ceil_div(busiest, resident) * each
    ) * tile.pace
    if splits == 1:
        return time
    # The last part of a tile waits for the others, then reads all of them.
    return time + costs.program + splits * outputs * 4 / second_bytes
