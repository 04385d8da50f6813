"""What is asked of an input's values before the engine runs on it, with and without the engine."""

import functools

import pytest
import torch
from native_ops import needs_engine

from depthfuse.native import library, values
from depthfuse.native.values import all_within

LIMIT = 100.0
NOT = (float("nan"), float("inf"), -float("inf"), LIMIT, -LIMIT, 1e30)


@pytest.fixture(params=[pytest.param(True, marks=needs_engine), False], ids=["engine", "numpy"])
def engine(request, monkeypatch):
    monkeypatch.setattr(values, "ready", library.library if request.param else lambda: None)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.usefixtures("engine")
def test_every_place_is_looked_at(count):
    x = torch.full((count,), -99.5)
    x[::2] = 99.5
    assert all_within(x, LIMIT)
    for place in range(count):
        for value in NOT:
            spoilt = x.clone()
            spoilt[place] = value
            assert not all_within(spoilt, LIMIT)


@pytest.mark.usefixtures("engine")
def test_only_the_tensor_s_own_values_count():
    whole = torch.full((4, 3, 6, 6), float("nan"))
    whole[1:3] = 1.0
    assert all_within(whole[1:3], LIMIT) and not all_within(whole[1:], LIMIT)
    image = torch.full((2, 6, 6, 6), float("nan"))
    image[:, :3, ::2] = 1.0
    assert all_within(image[:, :3, ::2], LIMIT)  # neither in order nor without gaps
    last = torch.ones(2, 3, 5, 5).to(memory_format=torch.channels_last)
    assert all_within(last, LIMIT)
    last[1, 2, 4, 4] = float("nan")
    assert not all_within(last, LIMIT) and not all_within(last.double(), LIMIT)
    assert all_within(torch.ones(5).double(), LIMIT)


def test_nothing_is_built_to_look(monkeypatch):
    @functools.cache
    def loading():
        pytest.fail("the engine was asked for")

    monkeypatch.setattr(library, "_loaded", loading)
    assert library.ready() is None and all_within(torch.ones(5), LIMIT)
