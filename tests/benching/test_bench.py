"""Comparing with what a user would run instead: who takes part, on what terms, and what is written down."""

import copy
import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import fake_engines
import pytest
import torch
from torch import nn

from depthfuse.benching import apart, bench
from depthfuse.benching import engines as contenders
from depthfuse.benching.apart import BUSY, CONVOLUTIONS, Failed, beside, time_apart
from depthfuse.benching.bench import compare, operations, randomised, ratios, write_csv
from depthfuse.benching.engines import ENGINES, OURS, Engine, available

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


def image(batch=2):
    return torch.randn(batch, 3, 6, 6)


def test_who_can_take_part(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert available(list(ENGINES), torch.float32, CPU) == [n for n in ENGINES if n != "eager replayed"]
    assert "openvino" in available(list(ENGINES), torch.bfloat16, CPU)
    assert "onnxruntime" not in available(list(ENGINES), torch.bfloat16, CPU)
    assert available(["openvino", "eager", "eager replayed"], torch.float32, GPU) == [
        "eager",
        "eager replayed",
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert available(["openvino", "onnxruntime"], torch.float32, CPU) == []


def test_rows():
    model = small_net()
    state = copy.deepcopy(model.state_dict())
    rows = compare(model, "small", image(), ["eager channels_last"], rounds=3, round_ms=0.1)
    assert [row["contender"] for row in rows] == [OURS, "eager channels_last"]
    for row in rows:
        assert (row["model"], row["batch"], row["dtype"]) == ("small", 2, "float32")
        assert row["latency_q1_ms"] <= row["latency_ms"] <= row["latency_q3_ms"]
        assert row["ratio_q1"] <= row["ratio_to_depthfuse"] <= row["ratio_q3"]
        assert float(row["max_relative_error"]) < 1e-5
    assert rows[0]["ratio_to_depthfuse"] == 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.is_contiguous()


def test_the_wrong_and_the_failing_are_left_out(monkeypatch, caplog):
    names = ["wrong", "nan", "failing", "dying"]
    for name in names:
        monkeypatch.setitem(ENGINES, name, Engine(getattr(fake_engines, name)))
    rows = compare(small_net(), "small", image(), names, rounds=2, round_ms=0.1)
    assert [row["contender"] for row in rows] == [OURS]
    assert "wrong is wrong on small" in caplog.text
    assert "nan is wrong on small" in caplog.text
    assert "failing does not run small: no such operator" in caplog.text and "and more" not in caplog.text
    assert "dying does not run small: its process ended with code 7" in caplog.text


def test_who_fails_while_it_is_timed_says_so():
    takes_part = lambda name, outcome: isinstance(outcome, float)  # noqa: E731
    with pytest.raises(Failed, match="it runs once"):
        time_apart({"it": fake_engines.once}, small_net(), image(), 2, 0.1, {}, takes_part)


def test_a_model_that_cannot_be_sent_to_another_process():
    model = small_net()
    model.hook = lambda: None
    with pytest.raises(
        RuntimeError, match="depthfuse does not run small: it cannot be sent to a process of its own"
    ):
        compare(model, "small", image(), ["eager"], rounds=2, round_ms=0.1)


@pytest.mark.parametrize(("neighbour", "processes", "threads"), [(BUSY, 2, 1), (CONVOLUTIONS, 1, 2)])
def test_beside_other_programs(neighbour, processes, threads):
    before = set(children())
    with beside(neighbour, processes):
        seen = set(children()) - before
        assert all(len(list(Path(f"/proc/{process}/task").iterdir())) >= threads for process in seen)
    assert len(seen) == processes and not (set(children()) - before)
    asked = {"busy_processes": processes} if neighbour == BUSY else {"beside_convolutions": True}
    rows = compare(small_net(), "small", image(), [], rounds=2, round_ms=0.1, **asked)
    assert [row["contender"] for row in rows] == [OURS]
    columns = {column for column in rows[0] if column.endswith("latency_ms")}
    assert columns == {"latency_ms", f"{neighbour}_latency_ms"}
    assert all(row[column] > 0 for row in rows for column in columns)
    assert set(children()) <= before


PARENT = """
import os, sys, time
from pathlib import Path
from depthfuse.benching.apart import beside

with beside(sys.argv[1]):
    print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("neighbour", [BUSY, CONVOLUTIONS])
def test_another_program_ends_when_we_are_killed(neighbour):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, neighbour], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_another_program_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setitem(apart._NEIGHBOURS, BUSY, "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended with code 3"), beside(BUSY):
        pass


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children():
    """The processes that this one has started and not ended."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_openvino_runs_bfloat16_by_a_hint_on_a_float32_graph(monkeypatch, dtype):
    seen = {}

    class Core:
        def read_model(self, graph):
            return graph

        def compile_model(self, graph, device, options):
            seen["options"] = options
            network = types.SimpleNamespace(outputs=["output"])
            infer = lambda inputs, **_: {"output": graph(torch.from_numpy(inputs[0])).numpy()}  # noqa: E731
            network.create_infer_request = lambda: types.SimpleNamespace(infer=infer)
            return network

    monkeypatch.setitem(sys.modules, "openvino", types.SimpleNamespace(Core=Core))
    monkeypatch.setattr(contenders, "onnx_of", lambda model, inputs: seen.update(x=inputs[0]) or model)
    model, x = small_net().to(dtype).requires_grad_(False), image().to(dtype)
    result = ENGINES["openvino"].make(model, x)(x)
    assert seen["x"].dtype == result.dtype == torch.float32
    assert (
        seen["options"]["INFERENCE_PRECISION_HINT"] == {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    )
    torch.testing.assert_close(result, model(x).float(), rtol=3e-2, atol=3e-2)
    assert model[0].weight.dtype == dtype


@pytest.mark.parametrize("name", ["executorch", "onnxruntime", "openvino", "zentorch"])
def test_engines_compute_the_same(name):
    if not available([name], torch.float32, CPU):
        pytest.skip(f"{name} or what it needs is not installed")
    model, x = small_net().requires_grad_(False), image()
    torch.testing.assert_close(ENGINES[name].make(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_torch_compile_is_frozen_and_compiles_once():
    model, x = small_net().requires_grad_(False), image()
    run = ENGINES["torch.compile"].make(model, x)
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs
    assert counters["inductor"]["binary_folding_conv"] > 0  # the batch norm: only frozen weights can take it


def test_operations_tell_what_each_costs():
    model, x = small_net(), image()
    report = operations(model, x)
    rows = report.rows()
    assert [row["path"] for row in rows] == ["0", "4"]  # a view computes nothing
    assert rows[0]["MACs"] == 2 * 16 * 4 * 27 and rows[0]["before_ms"] > 0
    assert "roofline_%" in str(report)


def test_a_table_grows_by_a_column(tmp_path):
    """Rows of an earlier version know fewer packages."""
    path = tmp_path / "table.csv"
    write_csv([{"model": "a"}, {"model": "b", "new": 2}], path, {"torch": "3"})
    assert list(csv.DictReader(path.open())) == [
        {"model": "a", "new": "", "torch": "3"},
        {"model": "b", "new": "2", "torch": "3"},
    ]


def test_tables_and_plots(tmp_path):
    facts = {"device": "abacus", "threads": 2}
    first = compare(small_net(), "small", image(1), ["eager"], rounds=2, round_ms=0.1)
    rows = [*first, *({**row, "batch": 2} for row in first)]
    write_csv(rows, tmp_path / "new" / "table.csv", facts)
    with open(tmp_path / "new" / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["batch"], row["contender"], row["device"]) for row in read] == [
        (batch, name, "abacus") for batch in "12" for name in (OURS, "eager")
    ]
    ratios(rows, "title").save_png(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert bench.machine(CPU)["torch"] == torch.__version__


def test_random_norms_do_something():
    model = randomised(small_net().train())
    assert not model.training and not model[1].running_mean.eq(0).any()
    again = randomised(small_net())
    assert torch.equal(again[1].running_var, model[1].running_var)
