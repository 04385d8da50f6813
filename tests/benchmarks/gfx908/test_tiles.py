"""Tiles for the MI100: the model that chooses them, and what simulations have found, as the package brings it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gfx908 import shipping
from benchmarks.gfx908.fitting import Quality, fit, quality, read
from depthfuse.kernels import attention, conv2d, depthwise, linear
from depthfuse.kernels.arguments import NO_TAIL, Window
from depthfuse.kernels.device.gfx908 import COSTS, TILES, Product, Tile, clocks, fastest
from depthfuse.kernels.device.tile import GemmConfig
from depthfuse.kernels.launch import TARGETS, empty_image
from depthfuse.kernels.tuning import lookup

TABLE = Path(__file__).parents[3] / "benchmarks" / "results" / "gfx908_tiles.csv"
MI100 = TARGETS["gfx908"]
RESNET = Product(128 * 784, 128, 128, 9, 1, 512, 2)  # a 3x3 of ResNet-34, batch 128


def test_more_work_takes_longer():
    for tile, splits in itertools.product(TILES, (1, 2)):
        time = clocks(RESNET, tile, splits, COSTS)
        for more in (
            {"m": 2 * RESNET.m},
            {"n": 2 * RESNET.n},
            {"k": 2 * RESNET.k},
            {"taps": 25},
            {"groups": 2},
        ):
            assert clocks(replace(RESNET, **more), tile, splits, COSTS) > time
        assert clocks(replace(RESNET, macs=256), tile, splits, COSTS) > time
        # nothing is faster than its products at the peak rate
        assert time >= 0.8 * RESNET.m * RESNET.n * RESNET.k * RESNET.taps / 512 / 120


def test_sums_are_cut_where_tiles_leave_compute_units_idle():
    few, many = replace(RESNET, m=49, n=512, k=512), replace(RESNET, k=512)
    assert fastest(few)[1] > 1
    assert fastest(many)[1] == 1


def test_the_constants_pick_what_was_fast_in_simulation():
    """Beside the fastest of all tiles that were tried: the layers of four networks, and all their shapes."""
    shapes = read(TABLE)
    assert len(shapes) > 50
    found = quality(shapes, TILES, COSTS)
    assert 1 <= found.layers < 1.1 and 1 <= found.mean < 1.1
    blind = quality(shapes, (replace(TILES[0], pace=1.0), TILES[-1]), COSTS)
    assert blind.mean > found.mean


def test_a_fit_mends_constants_that_are_off():
    shapes = dict(itertools.islice(read(TABLE).items(), 12))
    off = replace(COSTS, step=20 * COSTS.step, output=0.0)
    before = quality(shapes, TILES, off)
    tiles, costs, after = fit(shapes, TILES, off, steps=150, seed=0)
    assert after.value() < before.value()
    assert after == quality(shapes, tiles, costs)
    assert costs.second_bytes == COSTS.second_bytes  # not fitted: measured by others
    assert Quality(1.0, 1.0, 0.0).value() <= after.value()


def test_a_tile_of_more_programs_hides_more():
    alone, shared = Tile(128, 128, 64, 4, 1, 1.0), Tile(128, 128, 64, 4, 2, 1.0)
    assert clocks(RESNET, shared, 1, COSTS) < clocks(RESNET, alone, 1, COSTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles_are_what_the_compiler_takes(dtype):
    for m, n, k in ((49, 512, 4608), (128 * 784, 128, 1152), (197, 192, 768)):
        config = linear.config_for(m, k, n, dtype, MI100)
        assert config.nonkdim == 32 and config.kpack == 2
        sizes = {(tile.block_m, tile.block_n, tile.block_k, tile.num_warps) for tile in TILES}
        assert (config.block_m, config.block_n, config.block_k, config.num_warps) in sizes


TYPES = {
    "conv2d": GemmConfig,
    "linear": GemmConfig,
    "depthwise_conv2d": depthwise.DepthwiseConfig,
    "attention": attention.AttentionConfig,
}


def test_what_the_package_brings_is_whole():
    entries = lookup.packaged("gfx908")
    document = json.loads((lookup.PACKAGED / "gfx908.json").read_text())
    assert "simulated" in document["device"]  # nobody may take it for a measurement
    assert len(entries) == len(document["configs"]) > 20
    for key, entry in entries.items():
        assert lookup.parse(TYPES[key.split()[0]], entry.config) is not None, key
        assert entry.simulated and entry.latency_us < entry.heuristic_us


def test_a_launch_takes_it(monkeypatch):
    entries = {key: e for key, e in lookup.packaged("gfx908").items() if key.startswith("conv2d float16")}
    key, entry = next((k, e) for k, e in entries.items() if "taps=9" in k)
    sizes = {name: int(value) for name, value in (part.split("=") for part in key.split()[2:])}
    side = next(s for s in (56, 28, 14, 7) if sizes["pixels"] % s**2 == 0)
    x = empty_image(
        (sizes["pixels"] // side**2, sizes["channels"], side, side), torch.empty(0, device="meta").half()
    )
    weight = torch.empty(sizes["out_channels"], sizes["channels"], 3, 3, dtype=torch.float16, device="meta")
    y = empty_image((x.shape[0], sizes["out_channels"], side, side), x)
    weight = weight.contiguous(memory_format=torch.channels_last)

    def plan():
        return conv2d.plan(x, weight, NO_TAIL, y, Window(padding=(1, 1)), config=None, target=MI100)

    arguments = plan().arguments
    assert [arguments[f"BLOCK_{axis}"] for axis in "MNK"] == [entry.config[f"block_{axis}"] for axis in "mnk"]
    usual = conv2d.config_for(sizes["pixels"], x.shape[1], y.shape[1], 9, 1, torch.float16, MI100)
    monkeypatch.setenv("DEPTHFUSE_TUNE", "0")
    for cached in (lookup.enabled, lookup.packaged):
        cached.cache_clear()
    lookup._known.clear()
    lookup._found.clear()
    try:
        assert plan().arguments["BLOCK_M"] == usual.block_m and plan().arguments["BLOCK_N"] == usual.block_n
    finally:
        lookup.enabled.cache_clear()
        lookup._known.clear()
        lookup._found.clear()


ROW = {
    "request": "linear float16 rows=8",
    "chosen": "True",
    "config": "block_m=64 splits=1",
    "simulated_us": "10.0",
}


def test_only_clear_gains_are_shipped():
    other = ROW | {"chosen": "False", "config": "block_m=32 splits=2"}
    assert shipping.configurations([ROW, other | {"simulated_us": "9.9"}]) == {}
    (entry,) = shipping.configurations([ROW, other | {"simulated_us": "8.0"}]).values()
    assert entry == {
        "config": {"block_m": 32, "splits": 2},
        "latency_us": 8.0,
        "heuristic_us": 10.0,
        "simulated": True,
    }
