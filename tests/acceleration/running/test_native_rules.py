"""Each operation of a graph on the native engine, as models write it, against the model in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from native_ops import needs_engine
from nets import randomise_norms
from torch import nn

from depthfuse import accelerate
from depthfuse.acceleration.running.native_engine import compile_plan
from depthfuse.measuring.accuracy import relative_error
from depthfuse.native import plan as native
from depthfuse.native.plan import NativePlan

pytestmark = needs_engine


def direct(*_):
    return native.DIRECT


class Net(nn.Module):
    """Some function of an image [2, 8, 9, 7] and of modules that it may use."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv, self.narrow = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.norm, self.grouped = nn.BatchNorm2d(12), nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.wide, self.linear = nn.Conv2d(12, 36, 1), nn.Linear(12, 5)
        self.gate = nn.Parameter(torch.randn(12, 1, 1))
        self.over = nn.Linear(12 * 63, 5)
        self.places = nn.Parameter(torch.randn(1, 63, 12))

    def forward(self, x):
        return self.function(self, self.conv(x))


FUNCTIONS = {
    "squeeze and excite": lambda m, x: x * m.narrow(x.mean((2, 3), keepdim=True)).sigmoid(),
    "squeeze and excite, hard": lambda m, x: x * F.hardsigmoid(m.narrow(F.adaptive_avg_pool2d(x, 1))),
    "a gate on the left": lambda m, x: m.narrow(F.adaptive_avg_pool2d(x, 1)).tanh() * x,
    "a gate of pixels": lambda m, x: x * m.wide(x)[:, :1].sigmoid(),
    "a gate through a linear layer": lambda m, x: x[:, :5] * m.linear(x.mean((2, 3))).view(-1, 5, 1, 1),
    "group norms": lambda m, x: F.group_norm(F.group_norm(x * m.gate, 4, m.norm.weight, m.norm.bias).relu(), 1),
    "bigger": lambda m, x: F.interpolate(F.interpolate(x, scale_factor=2), (27, 15), mode="bilinear") * 2,
    "smaller": lambda m, x: F.interpolate(F.interpolate(x, (5, 6)), (4, 3), mode="bilinear", align_corners=True) * 2,
    "joined channels, innermost": lambda m, x: torch.cat([x, m.wide(x)], 1).permute(0, 2, 3, 1)
    + torch.cat([m.wide(x).permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)], -1),
    "two products": lambda m, x: (x * m.narrow(x)) * x,
    "relu after a sum": lambda m, x: F.relu(m.narrow(F.max_pool2d(x, 3, 1, 1)) * m.gate + x.mean((2, 3), keepdim=True)),
    "batch norm first": lambda m, x: m.narrow(m.norm(x * m.gate).relu()) + x,
    "what relu took is read again": lambda m, x: (y := m.norm(x * m.gate), y.relu() + m.narrow(y))[1],
    "constants": lambda m, x: (x * 3 - 1) / m.gate + m.gate * 0.5,
    "a number first": lambda m, x: 2 * F.max_pool2d(x, 2) + 1.5,
    "leaky relu": lambda m, x: F.leaky_relu(x * m.gate, 0.2) + F.leaky_relu(m.norm(x.sigmoid()), 0.05),
    "gelus": lambda m, x: F.gelu(x * m.gate) - 1 + F.gelu(m.norm(x.sigmoid()), approximate="tanh"),
    "relu6, silu, hardswish": lambda m, x: F.relu6(x * m.gate) + F.silu(m.norm(x.tanh())) + F.hardswish(x * 1.5),
    "groups": lambda m, x: m.grouped(x).relu(),
    "square": lambda m, x: x.square() * 0.25,
    "average pools": lambda m, x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    + F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), (2, 2), 2),
    "max pool that rounds up": lambda m, x: F.max_pool2d(x, 2, ceil_mode=True),
    "padding on one side": lambda m, x: m.narrow(F.pad(x, (0, 1, 2, 0))),
    "padding of channels": lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 3)) * 2,
    "padding with a number": lambda m, x: F.pad(x, (1, 1, 1, 1), value=-1.5) * 2,
    "joined channels": lambda m, x: torch.cat([x, m.narrow(x), m.wide(x)], 1).relu(),
    "joined with a constant": lambda m, x: torch.cat([x, m.gate.expand(2, 12, 9, 7)], 1) * 2,
    "split": lambda m, x: (lambda a, b, c: a * b + c)(*m.wide(x).split(12, 1)),
    "split by sizes": lambda m, x: m.narrow(m.wide(x).split([4, 12, 20], 1)[1]) * 2,
    "chunks": lambda m, x: (lambda a, b: torch.cat([b, a], 1))(*m.wide(x).chunk(2, 1)),
    "slices": lambda m, x: torch.cat([x[:, 3:], x[:, :3]], 1) * x[:, -12:],
    "slices of rows and columns": lambda m, x: x[:, :, 2:, 1:-1] * 2,
    "every second row and column": lambda m, x: m.narrow(x)[:, :, ::2, ::2] * 2,
    "every third row, innermost channels": lambda m, x: x.permute(0, 2, 3, 1)[:, 1::3] * 2,
    "a shortcut without weights": lambda m, x: F.pad(x[:, :, ::2, 1::2], (0, 0, 0, 0, 2, 2)).relu(),
    "pixels as channels": lambda m, x: torch.cat([x[..., :-1:2, ::2], x[..., 1::2, ::2]], 1).relu(),
    "tokens": lambda m, x: (t := x.flatten(2).transpose(1, 2) + m.places, m.linear(t[:, 1:] * t[:, :1]))[1],
    "tokens and back": lambda m, x: m.narrow((x.flatten(2).mT + m.places).mT.reshape(2, 12, 9, 7)),
    "tokens in other rows": lambda m, x: m.linear((x.flatten(2).mT + m.places).reshape(2, 7, 9, 12)),
    "views": lambda m, x: x.mean((2, 3)).unsqueeze(-1).unsqueeze(-1).squeeze(-1) * 2,
    "a classifier over an image": lambda m, x: m.over(m.narrow(x).flatten(1)).relu(),
    "a flat image": lambda m, x: m.narrow(x).flatten(1) * 2,
    "a classifier without flatten": lambda m, x: m.linear(x.mean(dim=(-2, -1))),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_runs_and_is_right(name):
    torch.manual_seed(0)
    model, x = randomise_norms(Net(FUNCTIONS[name])).eval(), torch.randn(2, 8, 9, 7)
    run = compile_plan(accelerate(model, x, tune="off").plan, (x,), direct)
    assert run is not None, "the engine does not take it"
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        assert run(x).shape == wanted.shape
        assert relative_error(run(x), wanted) < 1e-6


LEFT = {
    "two gates of different axes": lambda m, x: x.mean((2, 3), keepdim=True) * x[:, :1],
    "a difference": lambda m, x: x - m.narrow(x),
    "a quotient": lambda m, x: x / m.narrow(x),
    "a clamp": lambda m, x: F.hardtanh(x * 2, -1, 1),
    "a reflection": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "every second channel": lambda m, x: x[:, ::2] * 2,
    "another divisor": lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
    "columns as tokens": lambda m, x: x.permute(0, 3, 2, 1).reshape(2, 63, 12),
    "a scale that does not divide": lambda m, x: F.interpolate(x, scale_factor=1.3) * 2,
    "joined images": lambda m, x: torch.cat([x, x], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_it_has_not_it_leaves(name):
    model, x = Net(LEFT[name]).eval(), torch.randn(2, 8, 9, 7)
    assert compile_plan(accelerate(model, x, tune="off").plan, (x,), direct) is None


def kinds(function, monkeypatch):
    """The operations of the engine that a function becomes."""
    taken = []
    build = NativePlan.__init__

    def seen(self, builder):
        taken.extend(node.op for node in builder.nodes)
        build(self, builder)

    monkeypatch.setattr(NativePlan, "__init__", seen)
    model, x = randomise_norms(Net(function)).eval(), torch.randn(2, 8, 9, 7)
    assert compile_plan(accelerate(model, x, tune="off").plan, (x,), direct) is not None
    return taken


def test_an_activation_goes_into_what_it_follows(monkeypatch):
    assert kinds(FUNCTIONS["batch norm first"], monkeypatch).count(native.MAP) == 2  # gate; norm with relu
