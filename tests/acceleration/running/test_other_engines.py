"""Engines of others as candidates for a whole plan: who is asked, who wins, and what is never taken."""

import copy
import logging
import shutil
import statistics
import threading
import time

import pytest
import torch
from torch import nn

from depthfuse import accelerate, load_accelerated
from depthfuse.acceleration.running import choose
from depthfuse.acceleration.running.execution import ONEDNN, Executor
from depthfuse.acceleration.running.other_engines import (
    OTHER_ENGINES,
    Exported,
    OtherEngine,
    chosen_engines,
    compile_plan,
)
from depthfuse.errors import AccelerationError
from depthfuse.measuring.accuracy import relative_error
from depthfuse.ops.declare import DECOMPOSITIONS


def small():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 3, groups=16),
        nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 5),
    )  # fmt: skip
    return model.eval(), torch.randn(2, 3, 12, 12)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def calls(monkeypatch):
    """An engine named "another" that is taken for the fastest, and the threads that it ran with."""
    calls = []

    def make(exported, threads):
        run = exported.program.module()
        return lambda *inputs: calls.append(threads) or [run(*inputs)]

    monkeypatch.setitem(OTHER_ENGINES, "another", OtherEngine(make))
    monkeypatch.setattr(choose, "clearly_faster", lambda a, b, ms: a == "another")
    monkeypatch.setattr(choose, "judge", lambda execution, timings: execution)
    return calls


def test_who_is_asked(monkeypatch):
    monkeypatch.setitem(OTHER_ENGINES, "here", OtherEngine(lambda *_: None))
    monkeypatch.setitem(OTHER_ENGINES, "slow", OtherEngine(lambda *_: None, quick=False))
    monkeypatch.setitem(OTHER_ENGINES, "elsewhere", OtherEngine(lambda *_: None, ("not_a_package", "torch")))
    assert "here" in chosen_engines("auto")
    assert not {"slow", "elsewhere", "torch.compile"} & set(chosen_engines("auto"))
    assert chosen_engines("own") == chosen_engines(()) == ()
    assert chosen_engines("slow") == chosen_engines(["slow"]) == ("slow",)
    with pytest.raises(AccelerationError, match="pip install not_a_package$"):
        chosen_engines(("here", "elsewhere"))
    with pytest.raises(ValueError, match="'tvm', expected 'auto', 'own' or some of 'openvino'"):
        accelerate(*small(), engines=("tvm",))


def test_the_fastest_runs_and_the_report_says_by_how_much(calls):
    model, x = small()
    fast = accelerate(model, x, engines="another")
    report = fast.report()
    threads = torch.get_num_threads()
    assert report.executor.startswith(f"another for [2, 3, 12, 12] and {threads} threads, op by op for other")
    assert report.engines["another"] == 1.0 and {"op by op", "another"} <= set(report.engines)
    assert "engines by their time over that of the one chosen: " in str(report)
    calls.clear()
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5
        assert calls == [threads]
        assert {row["implementation"] for row in report.rows()} == {"another"}
        assert relative_error(copy.deepcopy(fast)(x), model(x)) < 1e-5
        assert len(calls) > 2  # the copy was checked before
        calls.clear()
        other = torch.randn(3, 3, 9, 14)
        assert relative_error(fast(other), model(other)) < 1e-5
        x[0, 0, 3, 3] = float("nan")
        assert torch.equal(fast(x).isnan(), model(x).isnan())
    assert not calls
    assert accelerate(model, x, engines="own").report().executor != report.executor


def test_with_other_threads_the_plan_runs(calls):
    model, x = small()
    fast = accelerate(model, x, engines="another")
    before = torch.get_num_threads()
    calls.clear()
    try:
        torch.set_num_threads(before + 1)
        with torch.no_grad():
            assert relative_error(fast(x), model(x)) < 1e-5
    finally:
        torch.set_num_threads(before)
    assert not calls


def test_what_was_chosen_before_is_not_measured_again(calls, monkeypatch):
    model, x = small()
    accelerate(model, x, engines="another")
    monkeypatch.setattr(choose, "least_ms", lambda *_, **__: pytest.fail("measured again"))
    assert accelerate(model, x, engines="another").report().executor.startswith("another")


def test_a_file_keeps_the_choice_or_does_without(calls, tmp_path, monkeypatch, caplog):
    model, x = small()
    accelerate(model, x, engines="another").save(tmp_path / "fast")
    loaded = load_accelerated(tmp_path / "fast")
    assert loaded.report().executor.startswith("another for [2, 3, 12, 12]")
    gone = OtherEngine(lambda *_: pytest.fail("it is not installed"), ("not_a_package",))
    monkeypatch.setitem(OTHER_ENGINES, "another", gone)
    loaded = load_accelerated(tmp_path / "fast", tune="heuristic")
    assert "another, which ran this model, is not installed" in caplog.text
    assert not loaded.report().executor.startswith("another")
    with torch.no_grad():
        assert relative_error(loaded(x), model(x)) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: [y * 1.001], "another is off by"),
        (lambda y: [y / 0], "another is off by inf"),
        (lambda y: [y.double()], "it gives"),
        (lambda y: [y, y], "it gives"),
        (lambda y: [y.T.contiguous().T], "would lie otherwise in memory"),
        (lambda y: [][0], "list index out of range"),
    ],
    ids=["wrong", "infinite", "dtype", "number", "layout", "raises"],
)
def test_what_disagrees_is_not_used(calls, wrong, said, monkeypatch, caplog):
    model, x = small()

    def make(exported, threads):
        run = exported.program.module()
        return lambda *inputs: wrong(run(*inputs))

    monkeypatch.setitem(OTHER_ENGINES, "another", OtherEngine(make))
    with caplog.at_level(logging.INFO, "depthfuse"):
        fast = accelerate(model, x, engines="another")
    assert said in caplog.text
    assert "another" not in fast.report().executor and "another" not in fast.report().engines
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5


def cannot(exported, threads):
    raise RuntimeError("no such operator\nand more")


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_an_engine_asked_for_by_name_that_fails_is_a_warning(monkeypatch, caplog):
    model, x = small()
    monkeypatch.setitem(OTHER_ENGINES, "another", OtherEngine(cannot))
    for engines in (("another",), "another"):  # the second time nothing is tried again
        caplog.clear()
        fast = accelerate(model, x, engines=engines)
        (said,) = warnings_in(caplog)
        assert (
            said == f"another does not run this model: no such operator. What runs: {fast.report().executor}"
        )
    assert copy.deepcopy(fast).report() == fast.report()


@pytest.mark.parametrize("engines", ["auto", "own"])
def test_nobody_is_warned_of_engines_that_nobody_named(engines, monkeypatch, caplog):
    model, x = small()
    for name in list(OTHER_ENGINES):
        monkeypatch.delitem(OTHER_ENGINES, name)
    monkeypatch.setitem(OTHER_ENGINES, "another", OtherEngine(cannot))
    with caplog.at_level(logging.INFO, "depthfuse"):
        accelerate(model, x, engines=engines)
    assert ("another does not run this plan: no such operator" in caplog.text) is (engines == "auto")
    assert "and more" not in caplog.text and not warnings_in(caplog)


def test_an_engine_that_was_chosen_and_fails_later_is_a_warning(calls, monkeypatch, caplog):
    model, x = small()
    accelerate(model, x, engines="another")
    monkeypatch.setitem(OTHER_ENGINES, "another", OtherEngine(cannot))
    fast = accelerate(model, x, engines="another")
    assert "another" not in fast.report().executor
    assert warnings_in(caplog)[0].startswith("another does not run this model: no such operator. What runs: ")


@pytest.mark.parametrize(
    "settings", [{"dtype": torch.float64}, {"tune": "heuristic"}, {"exact": True}], ids=str
)
def test_an_engine_asked_for_by_name_that_is_not_tried_is_a_warning(calls, settings, caplog, tmp_path):
    model, x = small()
    fast = accelerate(model, x, engines="another", **settings)
    assert not calls
    (said,) = warnings_in(caplog)
    assert said.startswith("another is not tried: it would be for float32 on a CPU")
    assert said.endswith(f"What runs: {fast.report().executor}")
    caplog.clear()
    fast.save(tmp_path / "fast")
    loaded = load_accelerated(tmp_path / "fast", engines="another")  # which keeps its choice
    assert not warnings_in(caplog) and loaded.report() == fast.report()


def test_onednn_graph_is_compared_with_the_plan_too(monkeypatch, caplog):
    model, x = small()
    monkeypatch.setattr(choose, "clearly_faster", lambda a, b, ms: a == ONEDNN)
    monkeypatch.setattr(
        choose, "compile_for_onednn", lambda module, _: lambda *inputs: module(*inputs) * 1.001
    )
    assert not accelerate(model, x, engines="own").report().executor.startswith(ONEDNN)
    assert "oneDNN Graph is off by" in caplog.text


class GivesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(x), x


def test_outputs_that_share_memory_are_left_to_the_plan(calls):
    x = torch.randn(2, 8)
    fast = accelerate(GivesItsInput().eval(), x, engines="another")
    assert "another" not in fast.report().engines
    assert fast(x)[1] is x or fast(x)[1].data_ptr() == x.data_ptr()


def test_every_op_of_ours_is_written_in_pytorchs_own():
    names = {
        name
        for name in dir(torch.ops.depthfuse)
        if isinstance(getattr(torch.ops.depthfuse, name), torch._ops.OpOverloadPacket)
    }
    assert {op.overloadpacket.__name__ for op in DECOMPOSITIONS} == names != set()


def test_an_export_holds_no_op_of_ours():
    model, x = small()
    fast = accelerate(model, x, tune="off")
    program = Exported(fast.plan, (x,)).program
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets and not any("depthfuse" in target for target in targets)
    assert "aten.conv2d.default" in targets and not any("batch_norm" in target for target in targets)
    with torch.no_grad():
        assert relative_error(program.module()(x), model(x)) < 1e-6


@pytest.mark.parametrize("name", [name for name in OTHER_ENGINES])
def test_engines_that_are_installed_compute_the_same(name):
    engine = OTHER_ENGINES[name]
    if engine.missing():
        pytest.skip(f"{' and '.join(engine.missing())} is not installed")
    if name in ("torch.compile", "zentorch") and shutil.which("g++") is None:
        pytest.skip("it needs a C++ compiler on a CPU")
    model, x = small()
    plan = accelerate(model, x, tune="off").made
    run = compile_plan(name, Exported(plan.module, (x,)))
    assert callable(run), run
    with torch.no_grad():
        first, wanted = run(x), model(x)
        kept = first.clone()
        assert relative_error(first, wanted) < 1e-5
        run(torch.randn_like(x))
        assert torch.equal(first, kept)  # each call has memory of its own
    found = {}
    images = [torch.randn_like(x) for _ in range(4)]

    def work(i):
        found[i] = [
            Executor(plan, compiled=run, compiled_for=(tuple(x.shape),))(call_of(plan, images[i]))
            for _ in range(20)
        ]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for i, image in enumerate(images):
            wanted = model(image)
            assert all(relative_error(y, wanted) < 1e-5 for y in found[i])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_threads_of_an_engine_rest_after_its_call(name):
    """Time of the processor, not of a clock: threads that went on spinning would take from what runs next."""
    if OTHER_ENGINES[name].missing():
        pytest.skip(f"{name} is not installed")
    model, x = small()
    plan = accelerate(model, x, tune="off").made
    run = compile_plan(name, Exported(plan.module, (x,)))
    spent = []
    for _ in range(10):
        run(x)
        before = time.process_time()
        time.sleep(0.02)
        spent.append(time.process_time() - before)
    assert statistics.median(spent) < 0.005


def call_of(plan, x):
    call = plan.example_call()
    return type(call)((x,), call.tree)
