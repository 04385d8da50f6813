"""Ridge regression from sums: against numpy, on exact data, and where the data says little."""

import numpy as np
import pytest
import torch

from depthfuse.errors import FitError
from depthfuse.fitting.least_squares import Sums, fit_linear


def rows(count, groups=1, wide=6, high=3, seed=0, noise=0.0, mean=0.0):
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(count, groups, wide, generator=rng, dtype=torch.float64) + mean
    true = torch.Generator().manual_seed(99)
    weight = torch.randn(groups, wide, high, generator=true, dtype=torch.float64)
    bias = torch.randn(groups, high, generator=true, dtype=torch.float64)
    y = torch.einsum("ngf,gfo->ngo", a, weight) + bias
    return a, y + noise * torch.randn(y.shape, generator=rng, dtype=torch.float64), weight, bias


def sums_of(*parts):
    sums = Sums.around(*parts[0])
    for part in parts:
        sums.add(*part)
    return sums


def test_a_linear_map_is_found_exactly_in_each_group_and_far_from_zero():
    a, y, weight, bias = rows(400, groups=3, mean=1e4)
    found, offset, _ = fit_linear(
        sums_of((a[:200], y[:200])), _like(a, y, slice(200, None)), torch.zeros_like(weight)
    )
    assert (found - weight).abs().max() < 1e-9
    assert (offset - bias).abs().max() < 1e-4  # of the mean 1e4 times the weights' error


def _like(a, y, part):
    """Sums around the same centre as those of the first 200 rows."""
    sums = Sums.around(a[:200], y[:200])
    sums.add(a[part], y[part])
    return sums


@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 0.5])
def test_as_the_augmented_least_squares_of_numpy(ridge):
    a, y, weight, _ = rows(50, noise=0.3, mean=2.0)
    prior = torch.full_like(weight, 0.7)
    found, offset = sums_of((a[:20], y[:20]), (a[20:], y[20:])).solve(ridge, prior)
    x, t, p = (v[:, 0].numpy() for v in (a, y, prior.movedim(0, 1)))
    centred, wanted = x - x.mean(0), t - t.mean(0) - (x - x.mean(0)) @ p
    penalty = np.sqrt(ridge * centred.var(0).mean() * len(x)) * np.eye(6)
    change = np.linalg.lstsq(
        np.vstack([centred, penalty]), np.vstack([wanted, np.zeros((6, 3))]), rcond=None
    )[0]
    np.testing.assert_allclose(found[0].numpy(), p + change, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(offset[0].numpy(), t.mean(0) - x.mean(0) @ (p + change), rtol=1e-8, atol=1e-8)


def test_the_error_is_that_of_the_rows():
    a, y, weight, bias = rows(70, groups=2, noise=0.5, mean=3.0)
    sums = sums_of((a, y))
    wrong, off = weight + 0.1, bias - 0.2
    direct = (y - torch.einsum("ngf,gfo->ngo", a, wrong) - off).square().sum() / 70
    assert sums.error(wrong, off) == pytest.approx(float(direct), rel=1e-10)


def test_features_without_variance_keep_the_prior():
    a, y, weight, _ = rows(60)
    a = torch.full_like(a, 3.0)
    prior = torch.full_like(weight, 0.5)
    found, offset = sums_of((a, y)).solve(1e-3, prior)
    assert torch.equal(found, prior)
    assert torch.allclose(offset[0], y.mean(0)[0] - 3.0 * 6 * 0.5)


def test_with_fewer_rows_than_unknowns_noise_is_not_learned():
    """The ridge is chosen on rows of other images, and then better than without one, and than knowing nothing."""
    a, y, weight, _ = rows(30, wide=40, noise=3.0)
    fresh, wanted, _, _ = rows(2000, wide=40, seed=5)
    prior = torch.zeros_like(weight)
    fitted = sums_of((a[:22], y[:22]))
    held_out = Sums.around(a[:22], y[:22])
    held_out.add(a[22:], y[22:])
    found, offset, ridge = fit_linear(fitted, held_out, prior)
    new = sums_of((fresh, wanted))
    assert ridge > 1e-4
    assert new.error(found, offset) < new.error(*(fitted + held_out).solve(1e-12, prior))
    assert new.error(found, offset) < new.error(*(fitted + held_out).solve(float("inf"), prior))


def test_numbers_that_are_not_finite_are_refused():
    a, y, _, _ = rows(10)
    for bad in (a, y):
        sums = Sums.around(a, y)
        kept = bad[3].clone()
        bad[3] = float("nan")
        with pytest.raises(FitError, match="not all finite"):
            sums.add(a, y)
        bad[3] = kept


def test_no_rows_are_refused():
    a, y, weight, _ = rows(10)
    with pytest.raises(FitError, match="no image"):
        Sums.around(a, y).solve(1.0, weight)
