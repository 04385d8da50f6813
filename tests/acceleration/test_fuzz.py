"""Nets that nobody thought of: whatever the grammar of `fuzz_nets.py` gives, accelerated or refused, but never wrong.

DEPTHFUSE_FUZZ=2000 python -m pytest tests/acceleration/test_fuzz.py     # a long run, other nets each time
"""

import copy
import os
from dataclasses import fields, is_dataclass

import torch
from fuzz_nets import SIDE, nets
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from depthfuse import accelerate, load_accelerated
from depthfuse.acceleration.planning.trees import flatten
from depthfuse.measuring.accuracy import relative_error

NETS = int(os.environ.get("DEPTHFUSE_FUZZ", "24"))
BOUND = {torch.float64: 1e-10, torch.float32: 1e-4}


def several(count):
    """Settings for `count` nets: the same ones each time, but in a long run. Shrinking takes longer than it helps."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=NETS <= 100,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def same(given, expected, bound):
    """Whether two outputs are alike: containers, dtypes, values."""
    if isinstance(expected, torch.Tensor):
        return given.dtype == expected.dtype and relative_error(given, expected) <= bound
    if type(given) is not type(expected):
        return False
    if is_dataclass(expected):
        pairs = [(getattr(given, f.name), getattr(expected, f.name)) for f in fields(expected)]
    elif isinstance(expected, dict):
        if list(given) != list(expected):
            return False
        pairs = [(given[key], expected[key]) for key in expected]
    elif isinstance(expected, list | tuple):
        if len(given) != len(expected):
            return False
        pairs = list(zip(given, expected, strict=True))
    else:
        return given == expected
    return all(same(g, e, bound) for g, e in pairs)


def computes_something(model, x):
    """Whether outputs are more than rounding: the mean of what an instance norm gives is 0, and nothing else."""
    runs = [
        flatten(copy.deepcopy(model).to(dtype)(x.to(dtype)))[0] for dtype in (torch.float32, torch.float64)
    ]
    return all(relative_error(coarse, fine) < 1e-2 for coarse, fine in zip(*runs, strict=True))


@several(NETS)
@given(
    nets(), st.sampled_from([torch.float64, torch.float32]), st.integers(0, 19), st.booleans(), st.booleans()
)
def test_any_net(model, dtype, lot, channels_last, dynamic):
    model = model.to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 2 * SIDE, 2 * SIDE, dtype=dtype)
    assume(computes_something(model, x))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tune = "measure" if lot == 0 else "heuristic" if lot < 6 else "off"
    fast = accelerate(model, x.clone(), tune=tune, dynamic=dynamic)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    copies = [copy.deepcopy(fast)] if lot % 4 == 1 else []
    with torch.no_grad():
        for batch, sharp in ((2, False), (3, lot % 2 == 0), (3, lot % 2 == 0)):
            images = torch.randn(batch, *x.shape[1:], dtype=dtype)
            expected = model(images.clone(), sharp=sharp)
            for each in (fast, *copies):
                assert same(each(images.clone(), sharp=sharp), expected, BOUND[dtype])


@several(max(NETS // 10, 1))
@given(nets())
def test_any_net_from_a_file(tmp_path_factory, model):
    if model.container in ("pair", "result"):
        model.container = "dict"  # classes of a user's are in no file
    x = torch.randn(2, 3, 2 * SIDE, 2 * SIDE)
    assume(computes_something(model, x))
    fast = accelerate(model, x, tune="heuristic")
    file = tmp_path_factory.mktemp("fuzz") / "fast.safetensors"
    fast.save(file)
    loaded = load_accelerated(file)
    with torch.no_grad():
        assert same(loaded(x), model(x), 1e-4)
        assert same(loaded(x), fast(x), 0.0)
