"""Predictions for the MI100 go by what its code does in a simulation."""

import math

import pytest
import torch

from depthfuse.costs.prediction import predict_model_ms
from depthfuse.costs.simulated import Launch, launches, share_of_roofline
from depthfuse.devices import DEVICES

KNOWN = (
    Launch(True, 1e9, 1e6, 0.5),
    Launch(True, 1e9, 2e6, 0.25),
    Launch(True, 1e6, 1e6, 0.1),
    Launch(False, 1e9, 1e6, 0.9),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_known_of_the_mi100(dtype):
    rows = launches("gfx908", dtype)
    assert len(rows) > 100 and {row.matrix for row in rows} == {True, False}
    for row in rows:
        assert row.flops > 0 and row.bytes_moved > 0 and 0 < row.share <= 1.05


def test_other_cards_have_the_roofline_alone():
    for arch in set(DEVICES) - {"gfx908"}:
        assert launches(arch, torch.float16) == ()
    assert share_of_roofline((), 1e9, 1e6, matrix=True) is None
    assert share_of_roofline(KNOWN[3:], 1e9, 1e6, matrix=True) is None


def test_the_nearest_of_the_same_unit_decide():
    near = share_of_roofline(KNOWN, 1e9, 1e6, matrix=True)
    assert 0.3 < near < 0.5  # mostly the first, a little of the others
    assert share_of_roofline(KNOWN, 1e9, 1e6, matrix=False) == pytest.approx(0.9)
    assert share_of_roofline(KNOWN, 1e6, 1e6, matrix=True) < near
    # between two, as far from both: their geometric mean
    middle = share_of_roofline(KNOWN[:2], 1e9, math.sqrt(2) * 1e6, matrix=True)
    assert middle == pytest.approx(math.sqrt(0.5 * 0.25))


def test_operations_of_no_arithmetic_or_no_bytes_have_a_share():
    assert 0.1 <= share_of_roofline(KNOWN, 0.0, 1e6, matrix=True) <= 0.5
    assert 0.1 <= share_of_roofline(KNOWN, 1e9, 0.0, matrix=True) <= 0.5


def test_a_network_takes_longer_than_its_roofline():
    """A convolution as ResNet-34's: by its roofline 5.0 us, more than a half of which no tile reaches at batch 1."""
    conv = torch.nn.Conv2d(128, 128, 3, padding=1)
    peaks = DEVICES["gfx908"].peaks(torch.float16)
    least_ms = peaks.least_ms(2 * 128 * 128 * 9 * 28 * 28, 2 * (2 * 128 * 28 * 28 + 128 * 128 * 9))
    one_ms = predict_model_ms(conv, (128, 28, 28), "mi100", torch.float16, 1) - 2e-3
    assert one_ms > 4 * least_ms
    many_ms = predict_model_ms(conv, (128, 28, 28), "mi100", torch.float16, 128) - 2e-3
    assert 128 * least_ms < many_ms < 3 * 128 * least_ms
