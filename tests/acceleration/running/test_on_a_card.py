"""The whole runtime on a card, with its defaults: on a real one where there is one, else on the test double of it."""

import copy
import threading

import pytest
import torch
from fake_cuda import FakeCuda, Race
from nets import build
from torch import nn

import depthfuse
from depthfuse.acceleration.running import choose, cuda_graphs
from depthfuse.measuring.accuracy import relative_error
from depthfuse.measuring.timing import time_interleaved

pytest.importorskip("triton", reason="its timer of replays is what measures on a card")
REAL = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if REAL else []


@pytest.fixture
def card(tmp_path, monkeypatch):
    """The double, or None beside a real card; nothing is known of earlier measurements."""
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))
    if REAL:
        yield None
    else:
        with FakeCuda(cards=2) as double:
            yield double


@pytest.fixture
def double():
    with FakeCuda(cards=2) as cuda:
        yield cuda


@pytest.fixture
def plan_wins(monkeypatch):
    """The model is not faster than its plan: what is measured here says nothing."""
    monkeypatch.setattr(choose, "judge", lambda execution, timings: execution)


@pytest.fixture
def measured_once(monkeypatch):
    """The same shape is captured a few times in tuning, not a hundred."""
    monkeypatch.setattr(
        "triton.testing.do_bench_cudagraph", lambda run, rep, return_mode: [run(), 1.0][1], raising=True
    )


def small(family, device="cuda"):
    model, size = build(family)
    return model.to(device), size


def images(batch, size, device="cuda"):
    return torch.randn(batch, *size, device=device)


def captured(fast):
    """How many shapes are replayed: what fell back to single launches computes the same."""
    return len(fast._executor.graphs)


def assert_same(fast, model, x):
    with torch.no_grad():
        given, expected = fast(x), model(x)
    torch.cuda.synchronize(x.device)
    assert given.device == x.device
    assert relative_error(given.cpu(), expected.cpu()) < 1e-3


@pytest.mark.parametrize("scope", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_the_defaults(family, scope, card, plan_wins, measured_once):
    model, size = small(family)
    with scope():
        x = images(2, size)
        fast = depthfuse.accelerate(model, x)
        assert fast.report().max_relative_error < 1e-3
        assert "graph" in fast.report().executor
        for batch in (2, 1, 3, 2):
            assert_same(fast, model, images(batch, size))
        assert captured(fast) == 3


def test_the_model_itself_where_that_is_faster(card, measured_once, monkeypatch):
    def model_wins(execution, timings):
        return choose.replace(execution, eager="eager", ratios={"eager": 0.5})

    monkeypatch.setattr(choose, "judge", model_wins)
    model, size = small("resnet")
    fast = depthfuse.accelerate(model, images(2, size))
    assert fast.runs_the_model
    assert_same(fast, model, images(2, size))


def test_tuning_by_the_timer_of_triton(card, plan_wins):
    """It measures on a stream of its own, which waits for nothing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval().cuda()
    x = torch.randn(2, 3, 8, 8, device="cuda")
    fast = depthfuse.accelerate(model, x)
    assert_same(fast, model, x)


@pytest.mark.skipif(REAL and torch.cuda.device_count() < 2, reason="needs two cards")
@pytest.mark.parametrize("current", [0, 1])
def test_a_model_on_another_card_than_the_current_one(current, card, plan_wins, measured_once):
    other = f"cuda:{1 - current}"
    with torch.cuda.device(current):
        model, size = small("resnet", other)
        fast = depthfuse.accelerate(model, images(2, size, other))
        for batch in (2, 3, 2):
            assert_same(fast, model, images(batch, size, other))
        assert torch.cuda.current_device() == current
        assert captured(fast) == 2
        moved = copy.deepcopy(fast).to(f"cuda:{current}")
        assert_same(moved, model.to(f"cuda:{current}"), images(2, size, f"cuda:{current}"))


@pytest.mark.parametrize("current", [0, 1])
def test_calls_on_other_streams(current, card, plan_wins, measured_once):
    """Each call is right for a caller who waits for his own stream alone, whichever card is the current one."""
    if current >= torch.cuda.device_count():
        pytest.skip("needs two cards")
    model, size = small("resnet", "cuda:0")
    fast = depthfuse.accelerate(model, images(2, size, "cuda:0"))
    torch.cuda.synchronize(0)
    streams = [torch.cuda.Stream("cuda:0") for _ in range(3)]
    kept = []
    for turn in range(6):
        stream = streams[turn % 3]
        with torch.cuda.stream(stream), torch.cuda.device(current), torch.no_grad():
            x = images(2, size, "cuda:0")
            kept.append((stream, x, fast(x)))
    assert captured(fast) == 2  # the second is that of the verification
    for stream, x, y in kept:
        stream.synchronize()
        with torch.cuda.stream(stream), torch.no_grad():
            assert relative_error(y.cpu(), model(x).cpu()) < 1e-3


def test_outputs_are_the_callers_to_keep(card, plan_wins, measured_once):
    model, size = small("resnet")
    fast = depthfuse.accelerate(model, images(2, size))
    with torch.no_grad():
        first, second = images(2, size), images(2, size)
        kept = fast(first)
        fast(second)
        assert relative_error(kept.cpu(), model(first).cpu()) < 1e-3


@pytest.mark.parametrize("tune", ["off", "heuristic"])
def test_without_measurement(tune, card):
    model, size = small("mobilenet")
    fast = depthfuse.accelerate(model, images(1, size), tune=tune, verify="blocks")
    assert max(entry.error or 0.0 for entry in fast.report().entries) < 1e-3
    assert_same(fast, model, images(2, size))


def test_half_precision_is_the_automatic_choice(card, plan_wins, measured_once):
    model, size = small("resnet")
    fast = depthfuse.accelerate(model, images(2, size), dtype="auto")
    assert fast.dtype == torch.float16
    with torch.no_grad():
        x = images(2, size)
        assert relative_error(fast(x).cpu(), model(x).cpu()) < 2e-2


def test_profile_and_copies_and_files(card, plan_wins, measured_once, tmp_path):
    model, size = small("resnet")
    x = images(2, size)
    fast = depthfuse.accelerate(model, x)
    assert all(entry.cost is not None for entry in fast.profile(x, model=model, passes=1).entries)
    assert_same(copy.deepcopy(fast), model, x)
    fast.save(tmp_path / "fast.safetensors")
    loaded = depthfuse.load_accelerated(tmp_path / "fast.safetensors", device="cuda")
    assert "graph" in loaded.report().executor
    assert_same(loaded, model, x)


def test_a_capture_lets_other_threads_wait_for_the_card(card):
    """And Python's garbage, which may hold a compiled kernel, is left for later."""
    seen = []

    def wait():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            seen.append(error)

    def run(x):
        if torch.cuda.is_current_stream_capturing():
            import gc

            assert not gc.isenabled()
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()
        return x * 2

    x = torch.randn(3, device="cuda")
    replay = cuda_graphs.capture(run, (x,))
    y = torch.randn(3, device="cuda")
    assert torch.equal(replay(y), y * 2)
    assert not seen


def test_what_cannot_be_captured_runs_launch_by_launch(card, caplog):
    def reads_a_value(x):
        return x * float(x.sum().item())

    graphs = cuda_graphs.GraphCache(reads_a_value)
    for _ in range(3):
        x = torch.randn(3, device="cuda")
        assert torch.allclose(graphs(x), reads_a_value(x))
    assert len(graphs) == 0
    assert "run launch by launch" in caplog.text


def test_what_no_kernel_takes_is_left_to_pytorch(card, measured_once, plan_wins):
    model, size = small("vit")
    model = model.double()
    fast = depthfuse.accelerate(model, images(2, size).double())
    assert {m.implementation() for m in fast.made.fused_modules().values()} == {"reference"}
    assert_same(fast, model, images(2, size).double())


@pytest.mark.skipif(REAL, reason="only a double knows what the host has waited for")
def test_latencies_are_those_of_the_card_that_is_named(double):
    x = torch.ones(3, device="cuda:1")
    time_interleaved({"add": lambda: x + 1}, rounds=1, min_round_ms=0.0, device=x.device)
    double.host_knows(torch.cuda.current_stream(x.device).clock())


# The double itself: what a card would punish is punished.


def test_the_double_sees_races(double):
    x = torch.ones(3, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        with pytest.raises(Race, match="reads what was written"):
            x + 1
        stream.wait_stream(torch.cuda.default_stream())
        y = x + 1
    with pytest.raises(Race, match="the host has not waited"):
        y.cpu()
    with pytest.raises(Race, match="writes over what is read"):
        x.zero_()
    stream.synchronize()
    assert y.cpu().tolist() == [2, 2, 2]
    x.zero_()


def test_the_double_records_without_doing(double):
    x, stream, graph = torch.ones(3, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = x * 2
        y += 1
        other = torch.zeros(3, device="cuda:1") + 1  # on another card: done, and not recorded
    torch.cuda.synchronize()
    assert y.cpu().isnan().all()
    assert other.cpu().tolist() == [1, 1, 1]
    x.fill_(5)
    graph.replay()
    assert y.cpu().tolist() == [11, 11, 11]
    assert len(graph.recorded) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.cuda.synchronize(),
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.nonzero(),
        lambda x: torch.cuda.current_stream().wait_stream(torch.cuda.default_stream()),
    ],
)
def test_the_double_permits_in_a_capture_what_a_card_permits(double, call):
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with (
        pytest.raises(RuntimeError, match="not permitted when|dependency created on|previous error during"),
        torch.cuda.graph(graph, stream=stream),
    ):
        call(x)


def test_the_double_keeps_cards_apart(double):
    one, two = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="tensors on cuda:0 and cuda:1"):
        one + two
    with pytest.raises(RuntimeError, match="on the CPU and on a card"):
        one + torch.ones(3)
    assert (one + two.to(one.device)).cpu().tolist() == [2, 2, 2]
    assert torch.empty(3, device="cuda").cpu().isnan().all()
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
