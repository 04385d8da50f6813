"""The usual call takes the shortcut, with the bits of the general way; any other call takes the general way."""

import copy
from dataclasses import replace

import pytest
import torch
from native_ops import needs_engine
from torch import nn

from depthfuse import accelerate, load_accelerated
from depthfuse.acceleration.model import AcceleratedModel
from depthfuse.acceleration.running.execution import NATIVE, Executor
from depthfuse.acceleration.running.native_engine import compile_plan
from depthfuse.acceleration.running.shortcut import Shortcut

pytestmark = needs_engine


class Net(nn.Module):
    """Takes a mask, too, and a number, neither of which the usual call has."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()

    def forward(self, x, mask=None, times=1.0):
        y = self.act(self.conv(x))
        return (y if mask is None else y * mask) * times


@pytest.fixture
def ways(monkeypatch):
    """Which way each call took."""
    taken = []
    call, shortcut = Executor.__call__, Shortcut.__call__

    def by_shortcut(self, x):
        y = shortcut(self, x)
        taken.extend([] if y is None else ["shortcut"])
        return y

    monkeypatch.setattr(
        Executor, "__call__", lambda self, given: taken.append("general") or call(self, given)
    )
    monkeypatch.setattr(Shortcut, "__call__", by_shortcut)
    return taken


@pytest.fixture
def fast():
    torch.manual_seed(0)
    model = accelerate(Net().eval(), torch.randn(2, 3, 9, 9), tune="heuristic", verify=False)
    return native_model(model)


def native_model(model: AcceleratedModel) -> AcceleratedModel:
    """The same with the native engine for its example, whatever was faster here."""
    plan, x = model.made, model.made.example_call().tensors
    execution = replace(model.execution, compiled=NATIVE, eager=None)
    executor = Executor(plan, execution, compile_plan(plan.module, x), (tuple(x[0].shape),))
    return AcceleratedModel(plan, executor, replace(model.report(), whole=NATIVE), model.original)


def test_the_usual_call(fast, ways):
    x = torch.randn(2, 3, 9, 9)
    y = fast(x)
    assert ways == ["shortcut"] and not y.requires_grad
    assert torch.equal(y, fast(x=x)) and ways == ["shortcut", "general"]
    assert torch.equal(y, fast(x.clone().requires_grad_()))
    kept = y.clone()
    fast(x + 1)
    assert torch.equal(y, kept)  # each call's output is its own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_usual_call_of_16_bits(dtype, ways):
    """With tensors of the model's dtype, and with float32, which is rounded to it."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 9)
    fast = native_model(
        accelerate(Net().eval(), x, dtype=dtype, tune="heuristic", verify=False, engines="own")
    )
    y = fast(x.to(dtype))
    assert ways == ["shortcut"] and y.dtype is dtype
    assert torch.equal(fast(x), y) and ways == ["shortcut", "shortcut"]
    assert torch.equal(fast(x=x.to(dtype)), y) and torch.equal(fast(x=x), y) and ways[2:] == ["general"] * 2
    torch.testing.assert_close(y, fast.original(x.to(dtype)), rtol=0.02, atol=0.02)
    ways.clear()
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    for given in (x.to(other), x.double(), x.to(dtype).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(fast(given), y, rtol=0.02, atol=0.02)
    for value in (float("nan"), float("inf")):
        spoilt = x.to(dtype).index_fill(0, torch.tensor(1), value)
        wanted = fast.original(spoilt)
        assert torch.equal(fast(spoilt).isnan(), wanted.isnan())
    assert "shortcut" not in ways


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.double(),
        lambda x: x[:1],
        lambda x: x.transpose(2, 3),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: nn.Parameter(x),
        lambda x: torch._neg_view(-x),
        lambda x: x.index_fill(0, torch.tensor(1), 1e7),
        lambda x: x.index_fill(0, torch.tensor(1), float("nan")),
    ],
    ids=["float64", "batch", "transposed", "channels_last", "parameter", "negated", "huge", "nan"],
)
def test_other_inputs(fast, ways, other):
    x = other(torch.randn(2, 3, 9, 9))
    given = fast(x)
    assert "shortcut" not in ways
    with torch.no_grad():
        wanted = fast.original(x.float())
    assert torch.equal(given.isnan(), wanted.isnan())
    torch.testing.assert_close(given, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_other_calls(fast, ways):
    x, mask = torch.randn(2, 3, 9, 9), torch.rand(2, 8, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, mask), fast.original(x, mask), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast(x, times=2.0), fast.original(x, times=2.0), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == fast.original(x).dtype
    assert "shortcut" not in ways
    for wrong in ((), (x, x, x, x), ("image",)):
        with pytest.raises(Exception, match=r"."):
            fast(*wrong)
    with pytest.raises(ValueError, match="input is on meta"):
        fast(x.to("meta"))
    with torch.device("meta"):
        assert fast(x).device.type == "cpu"


def test_ends_with_the_weights(fast, ways):
    x = torch.randn(2, 3, 9, 9)
    before = fast(x)
    state = {name: 2 * value for name, value in fast.state_dict().items()}
    fast.load_state_dict(state)
    after = fast(x)
    assert ways == ["shortcut", "general"]
    assert not torch.allclose(before, after)


def test_copies_and_files_have_it(fast, ways, tmp_path):
    x = torch.randn(2, 3, 9, 9)
    y = fast(x)
    fast.save(tmp_path / "net.safetensors")
    for other in (copy.deepcopy(fast), load_accelerated(tmp_path / "net.safetensors")):
        ways.clear()  # of what was tried in making it
        assert torch.equal(other(x), y)
        assert ways == ["shortcut"]


def test_more_than_one_output_and_chunks(fast):
    plan, executor = fast.made, fast._executor
    assert executor.shortcut is not None
    for other in (
        replace(executor, execution=replace(executor.execution, chunk=1)),
        replace(executor, compiled=None),
        replace(executor, compiled=lambda x: x),
        replace(executor, eager=lambda x: x),
        replace(executor, plan=replace(plan, writes_inputs=True)),
        replace(executor, plan=replace(plan, outputs=None)),
        replace(executor, compiled=replace(executor.compiled, single=False)),
    ):
        assert other.shortcut is None
    whole = replace(executor, execution=replace(executor.execution, chunk=2))
    assert whole.shortcut is not None
