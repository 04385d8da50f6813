"""Index functions: order, balance and division, and that the caller's random streams are left alone."""

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthfuse.data import order

label_lists = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(torch.tensor)


def test_epoch_order_is_a_permutation_fixed_by_seed_and_epoch():
    indices = torch.arange(3, 103)
    first = order.epoch_order(indices, seed=1, epoch=2)
    torch.rand(5)
    assert torch.equal(first, order.epoch_order(indices, seed=1, epoch=2))
    assert torch.equal(first.sort().values, indices)
    assert not torch.equal(first, order.epoch_order(indices, seed=1, epoch=3))
    assert not torch.equal(first, order.epoch_order(indices, seed=2, epoch=2))
    # (seed, epoch) is no sum or product of the two
    assert not torch.equal(first, order.epoch_order(indices, seed=2, epoch=1))


@given(label_lists, st.integers(1, 100))
def test_balanced_takes_classes_in_turn(labels, count):
    chosen = order.balanced(torch.arange(len(labels)), labels, count)
    assert len(chosen) == min(count, len(labels))
    assert len(chosen.unique()) == len(chosen)
    taken = torch.bincount(labels[chosen], minlength=5)
    available = torch.bincount(labels, minlength=5)
    # no class may be two ahead of one that still has images
    for cls in range(5):
        if taken[cls] < available[cls]:
            assert taken.max() <= taken[cls] + 1


@given(label_lists, st.floats(0, 0.99))
def test_holdout_is_disjoint_and_stratified(labels, share):
    train, held = order.split_holdout(torch.arange(len(labels)), labels, share)
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(len(labels)))
    for cls in labels.unique():
        size = int((labels == cls).sum())
        number = int((labels[held] == cls).sum())
        assert number < size
        assert number == min(round(size * share), size - 1)


def test_without_labels_the_choice_is_random_but_fixed():
    chosen = order.balanced(torch.arange(100), None, 10)
    assert torch.equal(chosen, order.balanced(torch.arange(100), None, 10))
    assert not torch.equal(chosen, torch.arange(10))
    train, held = order.split_holdout(torch.arange(100), None, 0.1)
    assert (len(train), len(held)) == (90, 10)


def test_seeded_image_fixes_all_three_streams_and_puts_them_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = [draw(), draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = draw()
    with order.seeded_image(1, 2, 3):
        inside = draw()
    assert [first, draw()] == expected
    with order.seeded_image(1, 2, 3):
        assert draw() == inside
    with order.seeded_image(1, 2, 4):
        other = draw()
    assert all(a != b for a, b in zip(inside, other, strict=True))
