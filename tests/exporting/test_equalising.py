"""Channels of a plan are scaled against each other: where that is exact, and nowhere else."""

import pytest
import torch
from nets import build
from torch import nn

from depthfuse import Supernet, merge
from depthfuse.exporting.equalising import equalise, equalised_subject
from depthfuse.exporting.sensitivity import layers_of
from depthfuse.exporting.subject import subject_of


class Net(nn.Module):
    """Layers that are called one after another: 3 channels of 9x9 pixels."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class Residual(nn.Module):
    """x + f(x) behind a convolution, `last` behind the sum, and a convolution that reads that."""

    def __init__(self, last, branch_end):
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 1)
        self.branch = nn.Sequential(nn.Conv2d(7, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 1), branch_end)
        self.last, self.head = last, nn.Conv2d(7, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(x + self.branch(x)))


class Seen(Net):
    """What is between the layers is an output, too."""

    def forward(self, x):
        y = self.layers[0](x)
        return y, self.layers[1:](y)


class Twice(Net):
    """One layer is called twice, and is two in the plan."""

    def forward(self, x):
        for layer in (self.layers[0], self.layers[1], self.layers[1], self.layers[2]):
            x = layer(x)
        return x


def conv(inputs, outputs, side=3, **settings):
    return nn.Conv2d(inputs, outputs, side, **settings)


def classifier(inputs):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 6))


# (net, how many streams of values are scaled)
EXACT = {
    "pair": (lambda: Net(conv(3, 7), nn.ReLU(), conv(7, 5)), 1),
    "no activation, no bias": (lambda: Net(conv(3, 7, bias=False), conv(7, 5, bias=False)), 1),
    "depthwise": (
        lambda: Net(conv(3, 7, 1), nn.ReLU(), conv(7, 7, groups=7, padding=1), nn.ReLU(), conv(7, 5, 1)),
        2,
    ),
    "depthwise with a multiplier": (
        lambda: Net(conv(3, 5, 1), nn.ReLU(), conv(5, 15, groups=5), conv(15, 2, 1)),
        2,
    ),
    "groups": (
        lambda: Net(
            conv(3, 15, stride=2), nn.ReLU(), conv(15, 9, groups=3, padding=1), nn.ReLU(), conv(9, 2, 1)
        ),
        2,
    ),
    "norm behind the activation": (
        lambda: Net(conv(3, 7), nn.ReLU(), nn.BatchNorm2d(7), conv(7, 5, padding=1)),
        1,
    ),
    "pools": (
        lambda: Net(
            conv(3, 7), nn.ReLU(), nn.MaxPool2d(2), conv(7, 5, padding=1), nn.AvgPool2d(2), conv(5, 3, 1)
        ),
        2,
    ),
    "classifier": (lambda: Net(conv(3, 7), nn.ReLU(), classifier(7), nn.ReLU(), nn.Linear(6, 3)), 2),
    "residual stream": (lambda: Residual(nn.Identity(), nn.Identity()), 2),
    "a layer that is called twice": (lambda: Twice(conv(3, 7, 1), conv(7, 7, 1), conv(7, 5, 1)), 3),
    "residual and relu": (lambda: Residual(nn.ReLU(), nn.Identity()), 2),
}

APART = {
    "relu6": lambda: Net(conv(3, 7), nn.ReLU6(), conv(7, 5)),
    "gelu": lambda: Net(conv(3, 7), nn.GELU(), conv(7, 5)),
    "sigmoid": lambda: Net(conv(3, 7), nn.Sigmoid(), conv(7, 5)),
    "an output": lambda: Seen(conv(3, 7), conv(7, 5)),
    "one layer": lambda: Net(conv(3, 7)),
    "pixels that become channels": lambda: Net(conv(3, 7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 49, 3)),
    "softmax over channels": lambda: Net(conv(3, 7), nn.Softmax(1), conv(7, 5)),
}


def subject(model, size=(3, 9, 9)):
    """In float64, with channels of very different size, one dead at each end."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[0] > 4:
            module.weight.data *= torch.logspace(-2, 2, len(module.weight)).view(
                -1, *(1,) * (module.weight.dim() - 1)
            )
            module.weight.data[1] = 0
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    return subject_of(model.double().eval(), torch.randn(2, *size).double(), None, "batch", on_cpu=True)


def outputs(subject):
    torch.manual_seed(1)
    given = subject.plan.module(torch.randn(5, *subject.call.tensors[0].shape[1:]).double())
    return [given] if isinstance(given, torch.Tensor) else list(given)


def weights(subject):
    return {name: layer.weight.clone() for name, layer in layers_of(subject.plan.module).items()}


@pytest.mark.parametrize("kind", EXACT)
def test_the_net_computes_the_same_bits(kind):
    make, streams = EXACT[kind]
    plain = subject(make())
    before = weights(plain)
    equalised, count = equalised_subject(plain)
    assert count == streams
    for given, exact in zip(outputs(equalised), outputs(plain), strict=True):
        assert exact.any() and torch.equal(given, exact)
    after = weights(equalised)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(weights(plain)[name], before[name]) for name in before)  # left alone


@pytest.mark.parametrize("kind", APART)
def test_where_scaling_would_change_the_outputs_nothing_is_scaled(kind):
    net = subject(APART[kind]())
    before = weights(net)
    assert equalise(net.plan.module) == 0
    assert all(torch.equal(weights(net)[name], before[name]) for name in before)


@pytest.mark.parametrize("where", ["behind the sum", "in the branch"])
def test_a_stream_with_an_activation_of_another_kind_is_left_alone(where):
    """Only what is between the two layers of the branch is scaled."""
    net = subject(
        Residual(nn.ReLU6(), nn.Identity()) if where == "behind the sum" else Residual(nn.ReLU(), nn.ReLU6())
    )
    plain, (equalised, count) = outputs(net), equalised_subject(net)
    assert count == 1 and torch.equal(outputs(equalised)[0], plain[0])
    before, after = weights(net), weights(equalised)
    assert sum(not torch.equal(after[name], before[name]) for name in before) == 2


def test_both_sides_of_a_channel_get_one_range():
    """sqrt(a b), to the next power of two: a factor of sqrt(2) each way."""
    net = subject(Net(conv(3, 7), nn.ReLU(), conv(7, 5)))
    equalise(net.plan.module)
    first, second = weights(net).values()
    written, read = first.flatten(1).abs().amax(1), second.abs().amax((0, 2, 3))
    alive = written > 0
    ratio = (written / read)[alive].log2().abs()
    assert alive.sum() == 6 and ratio.max() <= 1.0 + 1e-9


@pytest.mark.parametrize("family", ["resnet", "lite"])
def test_families_plain_and_merged(family):
    model, size = build(family)
    supernet = Supernet(model).eval()
    options = {path: names for path, names in supernet.options().items() if names}
    supernet.set_choices({path: options[path][0] for path in list(options)[::2]})
    for net in (model, merge(supernet, size)):
        plain = subject_of(net.double(), torch.randn(2, *size).double(), None, "batch", on_cpu=True)
        equalised, count = equalised_subject(plain)
        assert count > 0
        for given, exact in zip(outputs(equalised), outputs(plain), strict=True):
            assert (given - exact).abs().max() <= 1e-10 * exact.abs().max()
