"""Last layers of kept blocks: exact where a layer can make up for its inputs, left alone where it cannot."""

import copy

import pytest
import torch
from fitting_nets import FAMILIES, images, net_of
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations

from depthfuse import Supernet
from depthfuse.errors import FitError
from depthfuse.fitting import fit, kept
from depthfuse.fitting.fit import fit_chosen
from depthfuse.fitting.fitted import with_fitted
from depthfuse.fitting.kept import Replay, fit_kept
from depthfuse.fitting.recording import Call, record

CHANNELS = 6


class Residual(nn.Module):
    """act(x + scale * norm(conv(x)))"""

    def __init__(self, conv=None, norm=None, act=None, scale=1.0):
        super().__init__()
        self.conv = conv if conv is not None else nn.Conv2d(CHANNELS, CHANNELS, 1, bias=norm is None)
        self.norm, self.act, self.scale = norm or nn.Identity(), act or nn.Identity(), scale

    def forward(self, x):
        return self.act(x + self.scale * self.norm(self.conv(x)))


class Tokens(nn.Module):
    """[N, T, C], two layers, the last one's output scaled."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)
        self.gamma = nn.Parameter(torch.linspace(-1, 2, CHANNELS) + 0.1)

    def forward(self, x):
        return x + self.gamma * self.fc2(torch.tanh(self.fc1(x)))


def batch_norm():
    norm = nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


def calls(block, inputs):
    return record(Replay(block), "block", [Call((x,), {}, None, None) for x in inputs])


def inputs_of(block, count=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shape = (4, 9, CHANNELS) if isinstance(block, Tokens) else (4, CHANNELS, 5, 5)
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(count)]


def mixed(x):
    """Channels mixed by an invertible matrix, and shifted: what a 1x1, or a linear layer, can undo."""
    matrix = torch.eye(CHANNELS, dtype=x.dtype) + 0.3 * torch.randn(
        CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(1), dtype=x.dtype
    )
    return torch.einsum("oc,nchw->nohw", matrix, x) + 0.5


BLOCKS = {
    "a bias": lambda: Residual(),
    "a batch norm": lambda: Residual(norm=batch_norm()),
    "an activation": lambda: Residual(norm=batch_norm(), act=nn.ReLU()),
    "a scale": lambda: Residual(norm=batch_norm(), scale=-0.25),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_a_layer_can_undo_is_undone(name):
    torch.manual_seed(0)
    block = BLOCKS[name]().double().eval()
    original = copy.deepcopy(block)
    wanted = calls(original, inputs_of(block))
    spoilt = [mixed(call.args[0]) for call in wanted]
    assert fit_kept(block, calls(block, spoilt), wanted)
    for call, x in zip(wanted, spoilt, strict=True):
        assert (block(x) - call.output).abs().max() < 1e-10 * call.output.abs().max()
    (fresh,) = inputs_of(block, 1, seed=5)
    assert (block(mixed(fresh)) - original(fresh)).abs().max() < 1e-10 * original(fresh).abs().max()


def test_the_last_of_several_layers_is_fitted():
    torch.manual_seed(0)
    block = Tokens().double().eval()
    original = copy.deepcopy(block)
    wanted = calls(original, inputs_of(block, 24))
    given = calls(block, [call.args[0] + 0.2 for call in wanted])
    assert fit_kept(block, given, wanted)
    assert torch.equal(block.fc1.weight, original.fc1.weight) and torch.equal(block.gamma, original.gamma)

    def error(net):
        fresh = inputs_of(block, 4, seed=7)
        return sum(float((net(x + 0.2) - original(x)).detach().square().mean()) for x in fresh)

    assert error(block) < 0.2 * error(original)


def test_a_channel_that_counts_for_nothing_is_not_blown_up():
    """To take back an error through a scale of 1e-5 its weights would have to be 1e5."""
    torch.manual_seed(0)
    block = Tokens().double().eval()
    with torch.no_grad():
        block.gamma[:2] = torch.tensor([1e-5, -1e-5])
    original = copy.deepcopy(block)
    wanted = calls(original, inputs_of(block, 24))
    given = calls(block, [call.args[0] + 0.2 for call in wanted])
    assert fit_kept(block, given, wanted)
    for name in ("weight", "bias"):
        now, before = (getattr(net.fc2, name) for net in (block, original))
        assert torch.equal(now[:2], before[:2])
        assert all(not torch.equal(now[i], before[i]) for i in range(2, CHANNELS))
    assert block.fc2.weight.abs().max() < 10 * original.fc2.weight.abs().max()


def test_right_inputs_change_nothing():
    torch.manual_seed(0)
    block = Residual(norm=batch_norm(), act=nn.ReLU()).double().eval()
    original = copy.deepcopy(block)
    wanted = calls(original, inputs_of(block))
    assert fit_kept(block, wanted, wanted)
    (fresh,) = inputs_of(block, 1, seed=5)
    assert (block(fresh) - original(fresh)).abs().max() < 1e-10 * original(fresh).abs().max()


REFUSED = {
    "a norm over channels after it": lambda: Residual(norm=nn.GroupNorm(2, CHANNELS)),
    "no bias and no norm": lambda: Residual(conv=nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)),
    "other padding": lambda: Residual(
        conv=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect")
    ),
    "padding of its own": lambda: Residual(conv=Conv2dSame(CHANNELS, CHANNELS, 3, stride=1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_regression_is_left_alone(name):
    torch.manual_seed(0)
    block = REFUSED[name]().double().eval()
    before = copy.deepcopy(block.state_dict())
    wanted = calls(block, inputs_of(block))
    given = calls(block, [mixed(call.args[0]) for call in wanted])
    assert not fit_kept(block, given, wanted)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_layers_that_would_take_long_are_left_alone(monkeypatch):
    block = Residual(norm=batch_norm()).double().eval()
    before = copy.deepcopy(block.state_dict())
    wanted = calls(block, inputs_of(block))
    given = calls(block, [mixed(call.args[0]) for call in wanted])
    monkeypatch.setattr(kept, "LARGEST_FEATURES", CHANNELS - 1)
    assert not fit_kept(block, given, wanted)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    monkeypatch.setattr(kept, "LARGEST_FEATURES", CHANNELS)
    assert fit_kept(block, given, wanted)


def test_what_is_not_finite_is_an_error():
    block = Residual().double().eval()
    wanted = calls(block, inputs_of(block))
    given = calls(block, [mixed(call.args[0]) for call in wanted])
    given[3].args[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(FitError, match="finite"):
        fit_kept(block, given, wanted)


GAINING = ("resnet18", "mobilenetv2_035", "deit_tiny_patch16_224")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_block_after_a_pruned_one_comes_nearer_to_what_it_gave(name, monkeypatch):
    """On images that were not fitted on. What comes before the pruned block keeps its bits."""
    net, size = net_of(name)
    original = Supernet(net).eval()
    first, second, third = list(original.blocks)[:3]
    fresh = torch.cat(images(size, 2, seed=9))

    def pruned():
        supernet = with_fitted(Supernet(net)).eval()
        supernet.set_choices({second: original.options()[second][0]})
        fit_chosen(supernet, images(size, 8))
        return supernet

    def given(supernet):
        seen = []
        handle = supernet.blocks[third].register_forward_hook(lambda _m, _a, y: seen.append(y))
        supernet(fresh)
        handle.remove()
        return seen[0]

    found = pruned()
    monkeypatch.setattr(fit, "fit_kept", lambda *_: False)
    wanted, after, before = map(given, (original, found, pruned()))
    gain = float((before - wanted).norm() / (after - wanted).norm())
    # where images that are held out show no gain, weights stay, and the bias is a mean over other images
    assert gain > (1.02 if name in GAINING else 0.999)
    same = found.blocks[first].block.state_dict()
    assert all(
        torch.equal(value, same[key]) for key, value in original.blocks[first].block.state_dict().items()
    )


def test_computed_and_shared_weights_are_left_alone():
    net, size = net_of("resnet18")
    net.layer2.append(copy.deepcopy(net.layer2[1]))
    net.layer2[2].conv2 = net.layer2[1].conv2
    parametrizations.weight_norm(net.layer3[0].conv2)
    supernet = with_fitted(Supernet(net)).eval()
    left, fitted = ("layer2.1", "layer2.2", "layer3.0"), "layer4.0"
    before = {path: copy.deepcopy(supernet.blocks[path].block.state_dict()) for path in (*left, fitted)}
    supernet.set_choices({"layer2.0": "dense"})
    fit_chosen(supernet, images(size))

    def same(path):
        after = supernet.blocks[path].block.state_dict()
        return all(torch.equal(value, before[path][key]) for key, value in after.items())

    assert all(same(path) for path in left)
    assert not same(fitted)


def test_for_gradual_pruning_kept_blocks_stay_the_original_s():
    net, size = net_of("resnet18")
    supernet = with_fitted(Supernet(net)).eval()
    supernet.set_choices({"layer1.0": "dense"})
    fit_chosen(supernet, images(size), kept=False)
    supernet.set_lambda(1.0)
    (x,) = images(size, 1)
    with torch.no_grad():
        assert torch.equal(supernet(x), net(x))
