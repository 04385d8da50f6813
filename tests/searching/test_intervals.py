"""Intervals by published numbers, and by drawing: they hold the true value about as often as they say."""

import pytest
import torch

from depthfuse.searching.intervals import Paired, paired, points_lost, wilson


@pytest.mark.parametrize(
    ("right", "images", "wanted"),
    [
        (81, 263, (25.53, 36.62)),  # Newcombe (1998), table I, method 3
        (15, 148, (6.24, 16.05)),
        (0, 20, (0.0, 16.11)),
        (1, 29, (0.61, 17.18)),
        (20, 20, (83.89, 100.0)),
    ],
)
def test_wilson_gives_newcombes_numbers(right, images, wanted):
    assert wilson(100.0 * right / images, images) == pytest.approx(wanted, abs=0.006)


def test_pairs_count_where_the_two_differ():
    whole = torch.tensor([True, True, True, False, False])
    subnet = torch.tensor([True, False, False, True, False])
    assert paired(whole, subnet) == Paired(images=5, lost=2, gained=1)
    assert points_lost(paired(whole, whole))[0] == 0.0


def test_beside_the_unpruned_net_is_far_narrower():
    """1,000 images, 80 % and 79 % right, 20 answered otherwise."""
    lost, low, high = points_lost(Paired(1000, 15, 5))
    assert lost == pytest.approx(1.0) and low < lost < high
    alone = wilson(79.0, 1000)
    assert high - low < 0.4 * (alone[1] - alone[0])


def test_it_holds_the_true_difference_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([0.04, 0.02, 0.94])  # lost, gained, neither: 2 points lost in truth
    held, draws, images = 0, 4000, 300
    kinds = torch.multinomial(chances, draws * images, replacement=True, generator=generator).view(
        draws, images
    )
    for lost, gained in zip((kinds == 0).sum(1).tolist(), (kinds == 1).sum(1).tolist(), strict=True):
        _, low, high = points_lost(Paired(images, lost, gained))
        held += low <= 2.0 <= high
    assert 0.93 < held / draws < 0.98
