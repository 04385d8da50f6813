"""Whole nets by the native engine: what `accelerate` chooses by default, saves, and falls back from."""

import copy
import functools
import logging
from dataclasses import replace

import pytest
import torch
from native_ops import needs_engine
from nets import randomise_norms
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthfuse import accelerate, load_accelerated
from depthfuse.acceleration.running import choose, native_engine
from depthfuse.acceleration.running.execution import NATIVE, Execution, Executor
from depthfuse.acceleration.running.native_engine import WINOGRAD, compile_plan
from depthfuse.measuring.accuracy import relative_error
from depthfuse.native import library
from depthfuse.native import plan as native
from depthfuse.native.plan import NativePlan
from depthfuse.reporting import operations

import timm  # isort: skip

NETS = {
    "resnet18": 64,
    "mobilenetv2_100": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "mobilenetv1_100": 64,
}
pytestmark = needs_engine


def net(name):
    torch.manual_seed(0)
    size = {"img_size": 224} if name.startswith("vit") else {}
    model = randomise_norms(timm.create_model(name, num_classes=10, **size)).eval()
    return model, torch.randn(2, 3, NETS[name], NETS[name])


def everywhere(algorithm):
    """For all products that can be computed so, the others directly."""

    def choose(shape, filters, numbers):
        square = (*numbers[:4], *numbers[6:]) == (3, 3, 1, 1, 1, 1) and numbers[4] == numbers[5]
        return native.DIRECT if algorithm in WINOGRAD and not square else algorithm

    return choose


def squared_error(outputs, wanted):
    return (outputs.double() - wanted).square().sum()


@pytest.mark.parametrize("name", NETS)
def test_whole_nets(name):
    """No worse than three times PyTorch's own error, six times by Winograd's F(4,3).

    Over many images: of a single one the largest error is chance, between 1 and 7 times that of PyTorch.
    """
    model, x = net(name)
    x = torch.randn(12, *x.shape[1:])
    pairs = x.split(2)
    fast = accelerate(model, pairs[0], tune="off")
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        eager = model(x)
    for algorithm in (native.DIRECT, native.TILES, *WINOGRAD):
        run = compile_plan(fast.plan, (pairs[0],), everywhere(algorithm))
        assert run is not None
        times = 6 if algorithm == native.WINOGRAD_4 else 3
        y = torch.cat([run(pair) for pair in pairs])
        assert squared_error(y, wanted) < times**2 * squared_error(eager, wanted)
        assert torch.equal(run(pairs[0].to(memory_format=torch.channels_last)), y[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETS)
def test_whole_nets_of_half_precision(name, dtype):
    """As near to the model in float64 as PyTorch in that dtype is, and its dtype comes out.

    Over many images: of a single one the largest error is chance, between 0.1 and 2 times that of PyTorch.
    """
    model, x = net(name)
    model, x = model.to(dtype), torch.randn(12, *x.shape[1:]).to(dtype)
    pairs = x.split(2)
    fast = accelerate(model, pairs[0], tune="off")
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        eager = torch.cat([model(pair) for pair in pairs])
    run = compile_plan(fast.plan, (pairs[0],))
    assert run is not None
    y = torch.cat([run(pair) for pair in pairs])
    assert y.dtype is dtype
    assert 0 < squared_error(y, wanted) < 1.2 * squared_error(eager, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_in_half_precision(always, dtype):
    model, x = small()
    model, x = model.to(dtype), x.to(dtype)
    fast = accelerate(model, x)
    assert fast.report().executor.startswith("native engine for [2, 3, 12, 12]")
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        assert fast(x).dtype is dtype
        assert relative_error(fast(x), wanted) < 4 * torch.finfo(dtype).eps


def small():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Hardswish(), nn.Conv2d(16, 24, 1), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    return randomise_norms(model).eval(), torch.randn(2, 3, 12, 12)


@pytest.fixture
def always(monkeypatch):
    """The engine is taken for faster, whatever this machine measures."""
    usual = choose.clearly_faster
    monkeypatch.setattr(choose, "clearly_faster", lambda a, b, ms: b != NATIVE and usual(a, b, ms))
    monkeypatch.setattr(choose, "judge", lambda execution, timings: execution)


def test_the_default_measures_it_and_says_so(always, tmp_path):
    model, x = small()
    fast = accelerate(model, x)
    assert fast.report().executor.startswith("native engine for [2, 3, 12, 12]")
    with torch.no_grad():
        wanted = model(x)
        assert relative_error(fast(x), wanted) < 1e-5
        other = torch.randn(3, 3, 9, 14)
        assert relative_error(fast(other), model(other)) < 1e-5
    fast.save(tmp_path / "fast")
    loaded = load_accelerated(tmp_path / "fast")
    assert loaded.report().executor == fast.report().executor
    assert torch.equal(loaded(x), fast(x))
    assert relative_error(copy.deepcopy(fast)(x), wanted) < 1e-5


def test_nan_is_seen(always):
    model, x = small()
    fast = accelerate(model, x)
    x[1, 0, 3, 3] = float("nan")
    with torch.no_grad():
        assert torch.equal(fast(x).isnan(), model(x).isnan())


def test_what_disagrees_is_not_used(always, monkeypatch, caplog):
    model, x = small()
    honest = choose.compile_natively
    monkeypatch.setattr(choose, "compile_natively", lambda *args: lambda x: 1.001 * honest(*args)(x))
    with caplog.at_level(logging.WARNING):
        fast = accelerate(model, x)
    assert "native engine is off by" in caplog.text
    assert "native" not in fast.report().executor
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5


def test_changed_weights_are_not_forgotten(always):
    """What the engine packed belongs to the weights that it was made from."""
    model, x = small()
    fast = accelerate(model, x)
    with torch.no_grad():
        before = fast(x)
        moved = copy.deepcopy(fast).double()
        assert moved(x.double()).dtype is torch.float64
        assert relative_error(moved(x.double()), before) < 1e-5


def graph_of(function, *inputs):
    """What a function of tensors computes, as a graph of aten's operations, with a convolution before it."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(2, 4, 5, 5))

        def forward(self, x):
            return function(self, x)

    return accelerate(Around().eval(), *inputs, tune="off").plan


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (m.conv(x).relu(), x),
        lambda m, x: (y := m.conv(x).relu(), y.flatten(1)),
        lambda m, x: m.conv(x) + m.table,
        lambda m, x: m.conv(x).flatten(2) @ x.flatten(2).mT,
        lambda m, x: nn.functional.layer_norm(m.conv(x), (5,), x[0, 0, 0]),
        lambda m, x: m.conv(x).mean((0, 2)),
    ],
    ids=["input", "shared", "constant", "product", "affine", "mean"],
)
def test_what_it_would_do_wrong_it_leaves(function):
    """Outputs that share memory, constants that are broadcast the other way, values where constants are expected."""
    x = torch.randn(2, 3, 5, 5)
    assert compile_plan(graph_of(function, x), (x,)) is None


def operations_of_pytorch(call, x):
    """Those that a call runs, except what computes nothing."""

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.add(function)
            return function(*args, **(kwargs or {}))

    ran = set()
    with torch.no_grad(), Recorded():
        call(x)
    nothing = {torch.ops.aten.empty.memory_format, torch.ops.aten.detach.default}
    return {str(function) for function in ran - nothing}


def test_no_operation_of_pytorch_computes_beside_the_engine(always):
    """Its threads spin for milliseconds after each operation, on the cores that the engine's threads need."""
    model, x = small()
    fast = accelerate(model, x)
    assert "native engine" in fast.report().executor
    assert not operations_of_pytorch(fast, x)


def column(report, name="implementation"):
    """Of the report's table."""
    return [row.get(name) for row in report.rows()]


def test_the_report_names_what_runs_each_operation(always, monkeypatch, tmp_path):
    model, x = small()
    fast = accelerate(model, x, engines="own")
    bound = [entry.implementation for entry in fast.made.named_entries()]
    assert not operations_of_pytorch(fast, x)
    fast.save(tmp_path / "fast")
    for each in (fast, copy.deepcopy(fast), load_accelerated(tmp_path / "fast")):
        assert set(column(each.report())) == {NATIVE}
        assert column(each.report(), "op by op") == bound and NATIVE not in bound
    profiled = fast.profile(x, passes=1)
    assert set(column(profiled)) == {NATIVE} and column(profiled, "op by op") == bound
    kinds = "".join(operations.by_kind(profiled.rows()).itertext())
    assert operations.NATIVE == NATIVE and NATIVE in kinds and not any(name in kinds for name in bound)

    monkeypatch.setenv("DEPTHFUSE_NATIVE", "0")
    monkeypatch.setattr(library, "_loaded", functools.cache(lambda: "it is gone"))
    alone = load_accelerated(tmp_path / "fast", tune="heuristic", engines="own")
    assert any("conv" in name for name in operations_of_pytorch(alone, x))
    assert column(alone.report()) == [entry.implementation for entry in alone.made.named_entries()]
    assert NATIVE not in column(alone.report()) and set(column(alone.report(), "op by op")) == {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_a_profile_is_of_the_engine_that_runs(always, monkeypatch, name, dtype):
    """Every operation has its share, and together they are the engine's own times."""
    model, x = net(name)
    fast = accelerate(model, x, dtype=dtype, engines="own")
    x = x.to(dtype)
    seen, usual = [], NativePlan.profile
    monkeypatch.setattr(NativePlan, "profile", lambda *a, **k: seen.append(usual(*a, **k)) or seen[-1])
    costs = [entry.cost for entry in fast.profile(x, passes=2).entries]
    assert sum(cost.latency_ms for cost in costs) == pytest.approx(sum(seen[0]))
    assert all(cost.latency_ms > 0 for cost in costs if cost.macs) and min(c.latency_ms for c in costs) >= 0
    fast.profile(x[:1], passes=1)  # another batch runs op by op
    assert len(seen) == 1


def test_the_times_of_a_profile_are_where_they_were_spent(always, monkeypatch):
    """A node's time is its operations'; one of 0 ran with the next; a move of the input is the first operation's."""
    model, x = small()
    fast = accelerate(model, x, engines="own")
    names = fast._executor.compiled.names
    times = [float(2**i) for i in range(len(names))]
    times[2] = 0.0  # of the depthwise convolution, as if it ran with the next one
    monkeypatch.setattr(NativePlan, "profile", lambda *a, **k: times)
    costs = [entry.cost for entry in fast.profile(x, passes=1).entries]
    assert names[0] == () and costs[0].latency_ms == times[0] + times[1]
    shared, ways = times[3], [cost.roofline_ms for cost in costs[1:3]]
    assert [cost.latency_ms for cost in costs[1:3]] == pytest.approx([shared * w / sum(ways) for w in ways])
    assert sum(cost.latency_ms for cost in costs) == pytest.approx(sum(times))


def test_the_report_says_where_the_model_itself_runs(always, monkeypatch, tmp_path):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path))
    model, x = small()
    faster = {"eager": "eager", "ratios": {"eager": 0.5}}
    monkeypatch.setattr(choose, "judge", lambda execution, timings: replace(execution, **faster))
    fast = accelerate(model, x)
    assert operations_of_pytorch(fast, x) == operations_of_pytorch(model, x)
    assert set(column(fast.report())) == {"eager"}


def test_a_sign_that_is_not_in_memory_is_seen(always):
    model, x = small()
    fast = accelerate(model, x)
    assert "native engine" in fast.report().executor
    negated = torch.view_as_complex(torch.stack([x, x], -1)).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        assert relative_error(fast(negated), model(negated)) < 1e-5


def test_outputs_lie_in_memory_as_before(always):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert accelerate(model, x)(x).stride() == model(x).stride()


def test_what_the_engine_does_not_have_runs_as_before(always):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return torch.cumsum(self.conv(x).relu(), 1)

    model, x = Odd().eval(), torch.randn(1, 3, 8, 8)
    fast = accelerate(model, x)
    assert "native" not in fast.report().executor
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5


def test_executions_know_what_may_run():
    assert Execution(compiled=NATIVE).document()["compiled"] == NATIVE
    assert Execution.from_document(Execution(compiled=NATIVE).document()) == Execution(compiled=NATIVE)
    with pytest.raises(ValueError, match="compiled is True"):
        Execution(compiled=True)
    assert "native engine" in Executor(None, Execution(compiled=NATIVE), print, ((1,),)).in_words()


def test_exact_means_no_winograd(always, monkeypatch, tmp_path):
    """Sums of small integers have no rounding error, whatever their order; Winograd's transforms do."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))).eval()
    for conv in model:
        conv.weight.data = torch.randint(-2, 3, conv.weight.shape, generator=generator).float()
        conv.bias.data = torch.randint(-9, 9, conv.bias.shape, generator=generator).float()
    x = torch.randint(-3, 4, (1, 64, 28, 28), generator=generator).float()
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        winograd, asked = everywhere(native.WINOGRAD_4), []

        def fastest(*product, exact=False):
            asked.append(exact)
            return native.DIRECT if exact else winograd(*product)

        monkeypatch.setattr(native_engine, "fastest_algorithm", fastest)
        rounded = accelerate(model, x)
        assert rounded.report().executor.startswith(NATIVE)
        assert not torch.equal(rounded(x).double(), wanted)
        asked.clear()
        fast = accelerate(model, x, exact=True, engines="auto")
        assert fast.report().executor.startswith(NATIVE)
        assert torch.equal(fast(x).double(), wanted) and asked and all(asked)
        fast.save(tmp_path / "fast")
        for again in (load_accelerated(tmp_path / "fast"), copy.deepcopy(fast)):
            assert again.report().executor == fast.report().executor
            assert torch.equal(again(x).double(), wanted)
