"""Ridge regression from sums that are gathered batch by batch, in float64.

    minimise  sum_n |y_n - W a_n - b|^2 + ridge * v * |W - P|^2

P: the prior, what W is where the data says nothing. v: the mean variance of a feature, so that `ridge` has no unit.
The bias is not penalised. Sums are centred on the means of the first rows, so that a large mean costs no digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthfuse.errors import FitError

# Shares of a feature's variance. The first only bounds what rounding does; infinity is the prior itself.
RIDGES = (1e-12, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))


@dataclass
class Sums:
    """Sums over rows of G independent regressions (groups of a convolution), from F features to O outputs each.

    All float64: centre_in [G, F], centre_out [G, O]; of the centred rows: first_in [G, F], first_out [G, O],
    in_in [G, F, F], in_out [G, F, O], out_out [G, O]. The centres belong together: sums can be added if they are equal.
    """

    centre_in: Tensor
    centre_out: Tensor
    rows: int
    first_in: Tensor
    first_out: Tensor
    in_in: Tensor
    in_out: Tensor
    out_out: Tensor

    @classmethod
    def around(cls, features: Tensor, outputs: Tensor) -> Sums:
        """Empty sums, centred on the means of some rows; see `add`."""
        centre_in, centre_out = features.double().mean(0), outputs.double().mean(0)
        (groups, wide), high = centre_in.shape, centre_out.shape[1]
        new = centre_in.new_zeros
        square, cross = new(groups, wide, wide), new(groups, wide, high)
        return cls(
            centre_in, centre_out, 0, new(groups, wide), new(groups, high), square, cross, new(groups, high)
        )

    def add(self, features: Tensor, outputs: Tensor) -> None:
        """features [n, G, F], outputs [n, G, O]: n more rows. Raises FitError where they are not finite."""
        a, y = features.double() - self.centre_in, outputs.double() - self.centre_out
        for name, values in (("inputs", a), ("outputs", y)):
            if not bool(torch.isfinite(values).all()):
                raise FitError(
                    f"the {name} of the block are not all finite numbers: nothing can be fitted to them"
                )
        self.rows += len(a)
        self.first_in += a.sum(0)
        self.first_out += y.sum(0)
        self.in_in += torch.einsum("ngf,ngh->gfh", a, a)
        self.in_out += torch.einsum("ngf,ngo->gfo", a, y)
        self.out_out += y.square().sum(0)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.centre_in,
            self.centre_out,
            self.rows + other.rows,
            self.first_in + other.first_in,
            self.first_out + other.first_out,
            self.in_in + other.in_in,
            self.in_out + other.in_out,
            self.out_out + other.out_out,
        )

    def solve(self, ridge: float, prior: Tensor) -> tuple[Tensor, Tensor]:
        """(weight [G, F, O], bias [G, O]). prior: [G, F, O]. Raises FitError without rows."""
        if not self.rows:
            raise FitError("nothing to fit to: no image was given")
        mean_in, mean_out = self.first_in / self.rows, self.first_out / self.rows
        weight = prior
        if ridge != float("inf"):
            spread = self.in_in / self.rows - mean_in[:, :, None] * mean_in[:, None]
            joint = self.in_out / self.rows - mean_in[:, :, None] * mean_out[:, None]
            variance = spread.diagonal(dim1=1, dim2=2).mean(1)
            # a group of constant features keeps the prior: any weight serves it alike
            penalty = torch.where(variance > 0, ridge * variance, torch.ones_like(variance))
            damped = spread + torch.diag_embed(penalty[:, None].expand(-1, spread.shape[1]))
            weight = prior + torch.linalg.solve(damped, joint - spread @ prior)
        bias = self.centre_out + mean_out - ((self.centre_in + mean_in)[:, None] @ weight)[:, 0]
        return weight, bias

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error of y = a W + b over these rows, summed over outputs; weight [G, F, O], bias [G, O]."""
        # y - a W - b = (y - c_y) - (a - c_a) W - d
        d = bias - self.centre_out + (self.centre_in[:, None] @ weight)[:, 0]
        error = (
            self.out_out
            + (weight * (self.in_in @ weight)).sum(1)
            + self.rows * d.square()
            - 2 * (weight * self.in_out).sum(1)
            - 2 * d * self.first_out
            + 2 * d * (self.first_in[:, None] @ weight)[:, 0]
        )
        return float(error.sum()) / max(self.rows, 1)


def fit_linear(fitted: Sums, held_out: Sums, prior: Tensor) -> tuple[Tensor, Tensor, float]:
    """(weight [G, F, O], bias [G, O], the ridge): of `RIDGES` the one that errs least on rows of other images, then
    solved with all rows. prior: [G, F, O].
    """
    errors = [held_out.error(*fitted.solve(ridge, prior)) for ridge in RIDGES]
    ridge = RIDGES[min(range(len(RIDGES)), key=errors.__getitem__)]
    return (*(fitted + held_out).solve(ridge, prior), ridge)
