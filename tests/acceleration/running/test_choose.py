"""What runs a plan: by rule, by measurement, by what was measured before; and the model itself where that is faster."""

import copy

import pytest
import torch
from nets import build
from torch import nn

from depthfuse.acceleration import AccelerationError, accelerate
from depthfuse.acceleration.running import choose as executor
from depthfuse.acceleration.running import implementations as tune
from depthfuse.acceleration.running.choose import fingerprint, judge
from depthfuse.acceleration.running.execution import Execution
from depthfuse.fused.layers import FusedLinear, FusedModule
from depthfuse.measuring.accuracy import relative_error
from depthfuse.measuring.timing import Timing


def implementations(fast):
    return {m.implementation() for m in fast.modules() if isinstance(m, FusedModule)}


def refuse_to_measure(*args, **kwargs):
    raise AssertionError("something was measured")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_measuring(monkeypatch):
    for module in (tune, executor):
        monkeypatch.setattr(module, "time_interleaved", refuse_to_measure)


def pretend(monkeypatch, **latency_ms):
    """The whole model's comparison gives these times; operations are really measured."""
    names = {"ours": executor.ACCELERATED, "eager": "eager", "channels_last": "eager channels_last"}

    def timings(runs, *args, **kwargs):
        for run in runs.values():
            run()
        known = {names[name]: Timing((value,) * 3) for name, value in latency_ms.items()}
        return {name: known[name] for name in runs}

    monkeypatch.setattr(executor, "time_interleaved", timings)


def test_off_and_heuristic_measure_nothing(no_measuring, own_cache):
    model, size = build("resnet")
    x = torch.randn(2, *size)
    off, heuristic = (accelerate(model, x, tune=name) for name in ("off", "heuristic"))
    assert implementations(off) == {"plain"}
    assert {e.implementation for e in off.report().entries if e.fused} == {"plain"}
    for module in heuristic.modules():
        if isinstance(module, FusedModule):
            assert module.implementation() == module.candidates()[0]
    for fast in (off, heuristic):
        assert fast.report().executor == "op by op"
        assert not fast.report().latency_ms
        with torch.no_grad():
            assert relative_error(fast(x), model(x)) < 1e-5
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize(("family", "batch"), [("resnet", 3), ("vit", 1)])
def test_the_second_time_measures_nothing_anew(family, batch, own_cache, monkeypatch):
    model, size = build(family)
    x = torch.randn(batch, *size)
    first = accelerate(model, x)
    assert first.report().latency_ms.keys() >= {"accelerated", "eager"}
    for module in (tune, executor):
        monkeypatch.setattr(module, "time_interleaved", refuse_to_measure)
    second = accelerate(model, x)
    assert second.report() == first.report()
    with torch.no_grad():
        assert relative_error(second(x), model(x)) < 1e-5
    with pytest.raises(AssertionError, match="something was measured"):
        accelerate(model, torch.randn(batch + 1, *size))


def test_an_answer_that_makes_no_sense_is_measured_again(own_cache):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval()
    x = torch.randn(3, 6)
    accelerate(model, x)
    files = list(own_cache.rglob("*.json"))
    assert len(files) >= 2
    for path in files:
        path.write_text(
            path.read_text()
            .replace('"winner": "', '"winner": "magic ')
            .replace('"eager": null', '"eager": "magic"')
        )
    with torch.no_grad():
        assert relative_error(accelerate(model, x)(x), model(x)) < 1e-5
    assert not any("magic" in path.read_text() for path in files)


@pytest.mark.parametrize(
    ("latency_ms", "winner"),
    [
        ({"ours": 1.0, "eager": 2.0, "channels_last": 1.5}, None),
        ({"ours": 1.0, "eager": 1.0, "channels_last": 1.0}, None),
        ({"ours": 1.0, "eager": 0.8, "channels_last": 0.9}, "eager"),
        ({"ours": 1.0, "eager": 1.2, "channels_last": 0.5}, "eager channels_last"),
    ],
)
@torch.no_grad()
def test_the_fastest_runs(latency_ms, winner, own_cache, monkeypatch):
    model, size = build("resnet")
    x = torch.randn(2, *size)
    pretend(monkeypatch, **latency_ms)
    fast = accelerate(model, x)
    report = fast.report()
    assert list(report.latency_ms.values()) == list(latency_ms.values())
    assert f"eager {latency_ms['eager']:.3f} ms ({latency_ms['eager']:.2f}x)" in str(report)
    assert (winner is None) == (not report.executor.startswith("eager"))
    expected = model(x)
    assert relative_error(fast(x), expected) < 1e-5
    assert accelerate(model, x).report() == report
    if winner is None:
        return
    ratio = min(latency_ms.values())
    assert report.executor == f"{winner}: the model itself, whose time was {ratio:.2f} of the plan's"
    if winner == "eager":
        assert torch.equal(fast(x), expected)
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")
    assert torch.equal(fast(broken).isnan(), model(broken).isnan())
    # It is a copy; other copies, casts and loaded weights go back to the plan.
    for twin in (copy.deepcopy(fast), copy.deepcopy(fast).double()):
        assert relative_error(twin(x), expected) < 1e-5
    for parameter in model.parameters():
        parameter.zero_()
    assert relative_error(fast(x), expected) < 1e-5
    fast.load_state_dict({name: torch.zeros_like(value) for name, value in fast.state_dict().items()})
    assert not fast(x).any()


def test_the_model_itself_runs_in_the_dtype_asked_for(own_cache, monkeypatch):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval()
    x = torch.randn(3, 6)
    pretend(monkeypatch, ours=2.0, eager=1.0)
    fast = accelerate(model, x, dtype=torch.bfloat16)
    assert fast.report().executor.startswith("eager")
    assert fast(x).dtype == torch.bfloat16
    assert model[0].weight.dtype == torch.float32


def test_a_model_that_cannot_be_copied_is_refused():
    class Uncopied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x)

        def __deepcopy__(self, memo):
            raise RuntimeError("holds a socket")

    with pytest.raises(AccelerationError, match="Uncopied cannot be copied: holds a socket"):
        accelerate(Uncopied().eval(), torch.randn(1, 3, 4, 4))


def test_an_empty_batch_is_not_measured(no_measuring):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval()
    assert accelerate(model, torch.randn(0, 6)).report().executor == "op by op"


def test_judging_goes_round_by_round():
    # The machine slowed down threefold after the first round; within each round the plan was faster.
    ours, theirs = Timing((1.0, 3.0, 3.0)), Timing((1.2, 3.6, 3.6))
    judged = judge(Execution(chunk=2), {"accelerated": ours, "eager": theirs})
    assert (judged.eager, judged.chunk) == (None, 2)
    assert judged.ratios == {"eager": pytest.approx(1.2)}
    assert judge(Execution(), {"accelerated": theirs, "eager": ours}).eager == "eager"
    assert judge(Execution(), {"accelerated": ours}) == Execution()


def test_fingerprints():
    model, size = build("mobilenet")
    x = torch.randn(1, *size)
    first = accelerate(model, x, tune="heuristic").plan
    with torch.no_grad():
        model.conv_stem.weight.mul_(2)
    assert fingerprint(accelerate(model, x, tune="off").plan) == fingerprint(first)
    assert fingerprint(copy.deepcopy(first).double()) != fingerprint(first)
    wider = nn.Sequential(FusedLinear(torch.zeros(3, 4)))
    assert fingerprint(wider) != fingerprint(nn.Sequential(FusedLinear(torch.zeros(4, 3))))
    assert fingerprint(wider) != fingerprint(nn.Sequential(FusedLinear(torch.zeros(3, 4), act="relu")))


def test_a_gpu_chooses_between_triton_and_the_vendor(monkeypatch):
    """One op with two backends; here the choice is pretended, and the backend is what the op is given."""
    module = FusedLinear(torch.randn(4, 6))
    monkeypatch.setattr(FusedModule, "_resolved", lambda self: ("triton", False))
    assert module.candidates() == ["triton", "reference"]
    given = []
    monkeypatch.setattr(torch.ops.depthfuse, "linear", lambda *args: given.append(args[-2]) or args[0])
    x = torch.randn(2, 6)
    assert module.implementation() == "triton"
    for name in ("plain", *module.candidates()):
        module.use(name, x.shape)
        module(x)
    assert given == ["auto", "auto", "reference"]  # a choice of ours may still fall back
    assert module.implementation() == "reference"
    assert FusedLinear(torch.randn(4, 6), backend="triton").candidates() == ["triton"]
