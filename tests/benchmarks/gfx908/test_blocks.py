"""How many blocks are merged for a speed-up: by times that are made up, of the layers of real networks."""

import pytest

from benchmarks.gfx908 import blocks
from benchmarks.kernels.registry import NETWORKS, layers

BLOCKS = {"resnet34": 16, "convnext_tiny": 18, "deit_tiny_patch16_224": 12}


def rows_of(network, batch, time_us):
    """Rows of `times`, by a rule (name, case) -> microseconds."""
    found = {}
    for merged in (False, True):
        for name, case in layers(network, merged, batch).items():
            found[case.op, case.shape()] = time_us(name, case)
    facts = {"network": network, "batch": str(batch), "dtype": "fp16"}
    return [{**facts, "op": op, "shape": shape, "simulated_us": str(us)} for (op, shape), us in found.items()]


@pytest.mark.parametrize("network", BLOCKS)
def test_each_block_saves_its_launches(network):
    """Where each launch takes one microsecond, a block saves as many as its merged form has less."""
    times = blocks.times_of(rows_of(network, 8, lambda name, case: 1.0))
    whole_us, saved = blocks.savings(network, 8, "fp16", times)
    assert whole_us == len(layers(network, False, 8))
    assert len(saved) == BLOCKS[network]
    assert whole_us - sum(saved) == len(layers(network, True, 8))


@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_are_merged_until_it_is_enough(network):
    times = blocks.times_of(rows_of(network, 1, lambda name, case: case.flops()))
    whole_us, saved = blocks.savings(network, 1, "fp16", times)
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0
    found = blocks.merged_for(network, 1, "fp16", times, 1.05)
    assert found.of == len(saved) and 1 <= found.blocks <= found.of
    assert found.speedup == pytest.approx(whole_us / (whole_us - sum(saved[: found.blocks])))
    assert found.speedup >= 1.05 > whole_us / (whole_us - sum(saved[: found.blocks - 1]))
    beyond = blocks.merged_for(network, 1, "fp16", times, 1e9)
    assert beyond.blocks == beyond.of


def test_networks_that_are_not_whole_are_left_out():
    rows = rows_of("resnet34", 1, lambda name, case: 1.0)
    assert blocks.table(rows).count("resnet34") == 1
    assert blocks.table(rows[1:]).count("resnet34") == 0
