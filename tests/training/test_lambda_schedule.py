"""lambda schedules: ends, monotony, and exactly zero after the ramp."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthfuse.training.lambda_schedule import lambda_at


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@given(share=st.floats(0.05, 0.95), steps=st.integers(2, 200))
def test_falls_from_one_to_exactly_zero(schedule, share, steps):
    values = [lambda_at(i / steps, schedule, share) for i in range(steps + 1)]
    assert values[0] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert all(0.0 <= v <= 1.0 for v in values)
    assert all(v == 0.0 for i, v in enumerate(values) if i / steps >= share)


def test_known_values():
    assert lambda_at(0.35, "linear", 0.7) == pytest.approx(0.5)
    assert lambda_at(0.35, "cosine", 0.7) == pytest.approx(0.5)
    assert lambda_at(0.175, "cosine", 0.7) == pytest.approx(0.8535533905932737)
    assert lambda_at(0.0, "none", 0.7) == 0.0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        lambda_at(0.5, "linear", 1.0)
    with pytest.raises(ValueError, match="unknown lambda schedule 'square'"):
        lambda_at(0.5, "square", 0.5)
