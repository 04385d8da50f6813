"""Fitting of one merged block: what is linear is found, activations and norms are taken into account."""

import copy

import pytest
import torch
from torch import nn

from depthfuse.errors import FitError
from depthfuse.fitting.blocks import fit_block
from depthfuse.fitting.recording import Call, record
from depthfuse.merging.merged_blocks import (
    Dropped,
    MergedConv,
    MergedFactorised,
    MergedIdle,
    MergedLinear,
    PartlyIdle,
    TokenBatchNorm,
    WithNones,
)

ACTS = [
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Identity,
    lambda: nn.Hardtanh(-9.0, 9.0),
]


def images(count=4, channels=4, size=9, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(6, channels, size, size, generator=rng, dtype=torch.float64) for _ in range(count)]


def calls_of(original, batches):
    net = nn.Sequential(original.double().eval())
    return record(net, "0", batches)


def fitted(merged, original, batches):
    calls = calls_of(original, batches)
    merged = merged.double().eval()
    left = fit_block(merged, calls, calls)
    return merged, left


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_a_block_that_is_a_convolution_is_found(act, groups):
    torch.manual_seed(0)
    original = nn.Conv2d(4, 6, 3, 2, 1, groups=groups)
    merged = MergedConv(nn.Conv2d(4, 6, 3, 2, 1, groups=groups), act(), nn.BatchNorm2d(6))
    merged, left = fitted(merged, original, images())
    assert left < 1e-10
    for x in images(seed=0):
        assert (merged(x) - original(x)).abs().max() < 1e-8


@torch.no_grad()
def test_what_was_not_seen_is_found_too():
    """Activations have some room: nothing is cut off at the largest value that was seen."""
    torch.manual_seed(0)
    original = nn.Conv2d(4, 6, 1)
    merged, _ = fitted(
        MergedConv(nn.Conv2d(4, 6, 1), nn.ReLU6(), nn.BatchNorm2d(6)), original, images(count=8)
    )
    (x,) = images(count=1, seed=7)
    wanted = original(x)
    assert ((merged(x) - wanted).abs() < 1e-6 * wanted.std()).double().mean() > 0.999


@pytest.mark.parametrize("act", ACTS)
@torch.no_grad()
def test_a_block_of_tokens_is_found(act):
    torch.manual_seed(0)
    original = nn.Linear(5, 5)
    tokens = [torch.randn(3, 7, 5, dtype=torch.float64) for _ in range(4)]
    merged, left = fitted(
        WithNones(MergedLinear(nn.Linear(5, 5), act(), TokenBatchNorm(5)), 2), original, tokens
    )
    assert left < 1e-10
    assert (merged(tokens[0])[0] - original(tokens[0])).abs().max() < 1e-8


@torch.no_grad()
def test_a_skip_beside_the_layer_stays():
    torch.manual_seed(0)
    depthwise, pointwise = nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.Conv2d(4, 4, 1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise, self.pointwise = depthwise, pointwise

        def forward(self, x):
            return x + self.pointwise(self.depthwise(x))

    own = nn.Conv2d(4, 4, 3, 1, 1, groups=4)
    own.load_state_dict(depthwise.state_dict())
    merged = MergedFactorised(own, nn.Conv2d(4, 4, 1), nn.GELU(), nn.BatchNorm2d(4))
    merged, left = fitted(merged, Block(), images())
    assert left < 1e-10


@pytest.mark.parametrize("active", [False, True])
@torch.no_grad()
def test_the_linear_layer_of_idle_units_is_found(active):
    """Between other layers and a skip, beside units that keep their activation, with nothing after the sum."""
    torch.manual_seed(0)

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            units = (nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 5)) if active else ()
            self.norm, self.mlp = nn.LayerNorm(5), PartlyIdle(nn.Linear(5, 5), *units)

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    original = MergedIdle(Branch(), "mlp")
    merged = copy.deepcopy(original)
    merged.block.mlp.linear.reset_parameters()
    tokens = [torch.randn(3, 7, 5, dtype=torch.float64) for _ in range(8)]
    merged, left = fitted(merged, original, tokens)
    assert left < 1e-10
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    assert (merged(x) - original(x)).abs().max() < 1e-5


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_a_block_that_ends_in_the_activation_is_found(inplace):
    """What the layer is fitted to is what stands before it: a linear fit of the outputs could not be exact."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU(inplace))
    merged = MergedConv(nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(6))
    merged, left = fitted(merged, original, images())
    assert left < 1e-10
    (x,) = images(count=1, seed=3)
    assert (merged(x) - original(x)).abs().max() < 1e-8


class Residual(nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.conv, self.strength = nn.Conv2d(4, 4, 3, 1, 1), strength

    def forward(self, x):
        return x + self.strength * torch.sin(3 * self.conv(x))


@torch.no_grad()
def test_a_fit_is_never_worse_than_what_is_left_of_a_dropped_block():
    """A residual branch of which few noisy images say nothing: on other images the fit errs no more than dropping."""
    torch.manual_seed(0)
    original = Residual(0.3).double()
    merged = MergedConv(nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU6(), nn.BatchNorm2d(4))
    merged, _ = fitted(merged, original, [x[:1, :, :4, :4] for x in images(count=4)])
    (x,) = images(count=1, seed=8)
    error, dropped = ((net(x) - original(x)).square().mean() for net in (merged, nn.Identity()))
    assert error < 1.5 * dropped


@torch.no_grad()
def test_the_wanted_outputs_may_be_of_other_inputs():
    """Of the original net, where what is given is already changed: the fit makes up for that."""
    torch.manual_seed(0)
    original, batches = nn.Conv2d(4, 4, 1).double(), images()
    wanted, given = calls_of(original, batches), calls_of(original, [2 * x + 1 for x in batches])
    merged = MergedConv(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).double().eval()
    assert fit_block(merged, given, wanted) < 1e-10
    assert (merged(2 * batches[0] + 1) - original(batches[0])).abs().max() < 1e-8


@torch.no_grad()
def test_a_constant_channel_stays_finite():
    torch.manual_seed(0)
    original = nn.Conv2d(4, 6, 1)
    original.weight[2] = 0.0
    merged, left = fitted(MergedConv(nn.Conv2d(4, 6, 1), nn.ReLU6(), nn.BatchNorm2d(6)), original, images())
    assert left < 1e-10
    assert (merged(images()[0])[:, 2] - original.bias[2]).abs().max() < 1e-8


def test_nothing_to_fit():
    batches = images()
    calls = calls_of(nn.Identity(), batches)
    assert fit_block(Dropped(), calls, calls) is None


def test_faults_are_named():
    torch.manual_seed(0)
    original, batches = nn.Conv2d(4, 4, 1), images()
    merged = MergedConv(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).double().eval()
    calls = calls_of(original, batches)
    with pytest.raises(FitError, match="two batches"):
        fit_block(merged, calls[:1], calls[:1])
    broken = [Call(call.args, call.kwargs, call.output * float("nan"), None) for call in calls]
    with pytest.raises(FitError, match="finite"):
        fit_block(merged, calls, broken)
    large = MergedConv(nn.Conv2d(520, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.raises(FitError, match="4680 inputs"):
        fit_block(large, calls, calls)


def test_a_block_that_is_not_run_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(FitError, match="does not run idle"):
        record(Net().double(), "idle", images())
