"""What goes wrong around a model rather than in it: watchers, tied weights, odd memory, odd numbers, long runs.

Tests of the cache's own faults (processes at once, killed ones, damaged files) lie in test_cache.py; those of training
mode and of wrong inputs in test_accelerate.py.
"""

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import build
from torch import nn

from depthfuse.acceleration import accelerate
from depthfuse.measuring.accuracy import relative_error

FEW = ("resnet", "mobilenet", "convnext_linear", "vit_scaled")
STATM = Path("/proc/self/statm")


def same_as(model, fast, x):
    """The bound of accelerate's own tests for float32: other orders of summation, through a few dozen layers."""
    with torch.no_grad():
        return relative_error(fast(x), model(x)) < 1e-5


def test_hooks_on_the_model_itself():
    model, size = build("resnet")
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append("before") or (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: calls.append("after") or output + 1)
    x = torch.randn(2, *size)
    fast = accelerate(model, x)
    assert fast.report().fused_count > 0
    assert same_as(model, fast, x)
    calls.clear()
    fast(x)
    assert calls == ["before", "after"]


def test_hooks_that_come_after_are_not_the_plans():
    model, size = build("resnet")
    x = torch.randn(1, *size)
    fast = accelerate(model, x)
    expected = fast(x)
    model.layer1[0].register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(fast(x), expected)
    assert not same_as(model, fast, x)


class Tied(nn.Module):
    """One convolution at three sizes, with another activation each time, and its weight once more as a tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.twin = nn.Conv2d(4, 4, 3, padding=1)
        self.twin.weight = self.conv.weight

    def forward(self, x):
        y = F.relu(self.conv(x))
        y = F.silu(self.conv(F.max_pool2d(y, 2)))
        y = F.relu(self.twin(y)) + self.conv(y)
        return F.conv2d(y, self.conv.weight)


@pytest.mark.parametrize("tune", ["off", "heuristic", "measure"])
def test_tied_layers_at_several_sizes(tune):
    model = Tied().eval()
    x = torch.randn(2, 4, 13, 9)
    fast = accelerate(model, x, tune=tune)
    assert same_as(model, fast, x)
    assert same_as(model, fast, torch.randn(3, 4, 8, 21))
    assert same_as(model, copy.deepcopy(fast), x)


STRIDES = {
    "one image for all": lambda x: x[:1].expand(3, -1, -1, -1),
    "one column for all": lambda x: x[..., :1].expand_as(x),
    "rows and columns exchanged": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "an odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "inside a larger image": lambda x: F.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("family", FEW)
def test_inputs_of_unusual_strides(family, strides):
    model, size = build(family)
    x = STRIDES[strides](torch.randn(3, *size))
    fast = accelerate(model, torch.randn(3, *size), tune="heuristic")
    before = x.clone()
    assert same_as(model, fast, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("family", FEW)
def test_nan_in_bfloat16(family):
    """Infinities are for float32: oneDNN's own bfloat16 convolution turns some into NaN, depending on the layout."""
    model, size = build(family)
    model = model.bfloat16()
    x = torch.randn(3, *size, dtype=torch.bfloat16)
    fast = accelerate(model, x, tune="heuristic")
    x[1, 0, 5, 7] = float("nan")
    with torch.no_grad():
        expected, given = model(x), fast(x)
    assert not expected[1].isfinite().all()
    assert torch.equal(given.isnan(), expected.isnan())


def test_nothing_but_nan():
    model, size = build("mobilenet")
    x = torch.full((2, *size), float("nan"))
    fast = accelerate(model, torch.randn(2, *size))
    assert fast(x).isnan().all()
    assert fast(torch.zeros_like(x)).isfinite().all()  # and nothing of it stays behind


def resident_bytes():
    return int(STATM.read_text().split()[1]) * 4096


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("tune", ["heuristic", "measure"])
def test_ten_thousand_calls_keep_no_memory(tune):
    model = nn.Sequential(nn.Conv2d(2, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1)).eval()
    batches = [
        torch.randn(1 + index % 3, 2, 16, 16) for index in range(5)
    ]  # what is kept per shape would show too
    fast = accelerate(model, batches[0], tune=tune)
    output_bytes = fast(batches[0]).nbytes
    calls = 10_000

    def run(count):
        for index in range(count):
            fast(batches[index % 5])

    run(500)
    gc.collect()
    objects, memory = len(gc.get_objects()), resident_bytes()
    run(calls)
    gc.collect()
    # One small object, or the smallest output, kept at every tenth call would be too much.
    assert len(gc.get_objects()) - objects < calls / 10
    assert resident_bytes() - memory < output_bytes * calls / 10
