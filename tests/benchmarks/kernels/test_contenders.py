"""The launch configurations that tuning would try, at every shape of the networks: some, and all within the limits."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from benchmarks.kernels.registry import NETWORKS, unique_cases
from depthfuse.kernels.launch import TARGETS
from depthfuse.kernels.tuning import space
from depthfuse.kernels.tuning.lookup import session


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((arch, torch.float16) for arch in TARGETS), ("sm_90", torch.float32)]
)
def test_every_shape_of_the_networks_has_candidates_within_the_limits(arch, dtype):
    target = TARGETS[arch]
    seen = {}
    with session() as watch:
        for network in NETWORKS:
            for batch in (1, 128):
                for case in unique_cases(network, batch):
                    case.launches(dtype, target)
        seen = dict(watch.seen)
    assert {r.op for r in seen} == set(space._SPACES)
    for found in seen:
        shape = dict(found.shape)
        if found.op == "conv2d" and shape["channels"] < 32 and target.backend == "hip":
            continue  # the heuristic places the stem by hand
        options = space.candidates(found)
        assert options, found.key()
        assert len(set(options)) == len(options) <= space.MOST
        usage = space._SPACES[found.op][1]
        for config in options:
            used = usage(config, found, shape)
            assert used.shared_bytes <= target.shared_bytes
            assert used.registers <= space.register_limit(config.num_warps, target)
