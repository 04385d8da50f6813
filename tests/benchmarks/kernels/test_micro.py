"""The microbenchmarks' plumbing on a CPU: what they refuse to time, what they write, and where they go on."""

import csv
import functools
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="the cases plan launches of Triton kernels, and Triton is not installed")

from benchmarks.kernels import contenders, micro, micro_report
from benchmarks.kernels.block_cases import AttentionCase, InvertedResidualCase, MlpCase
from benchmarks.kernels.cases import Conv2dCase, DepthwiseCase, LinearCase
from depthfuse.measuring.roofline import Peaks

CPU = torch.device("cpu")
CONV = Conv2dCase(2, 8, 6, 12, 3, 1, 1, "relu", True, True)
LINEAR = LinearCase(5, 16, 8, "gelu", True, True, True)
CASES = [
    CONV,
    DepthwiseCase(1, 8, 6, 8, 3, 2, 1, "relu6"),
    DepthwiseCase(1, 8, 6, 8, 7, 1, 3, norm=True),
    LINEAR,
    MlpCase(5, 16, 32, norm=True),
    InvertedResidualCase(1, 8, 6, 24, 8, 1, skip=True),
    InvertedResidualCase(1, 8, 6, 24, 12, 2, skip=False),
    AttentionCase(1, 7, 2, 32),
]


@pytest.fixture
def quick(monkeypatch):
    """Two cases, rounds as short as they go, peaks that need no measuring, and tests that pass without running."""
    monkeypatch.setattr(micro, "select_cases", lambda *_: {CONV: ["net:conv"], LINEAR: ["net:a", "net:b"]})
    monkeypatch.setattr(micro, "passes_tests", lambda op, device: True)
    monkeypatch.setattr(micro, "CPU_ROUND_MS", 0.01)
    monkeypatch.setattr(micro, "peaks_of", lambda device, dtype: Peaks(0.1, 0.1, 10.0, "a toy's peaks"))


def run(folder, *more):
    return micro.main(["--device", "cpu", "--rounds", "3", "--out", str(folder), *more])


def read(folder):
    (path,) = folder.glob("micro_*_fp32_torch*_triton*.csv")
    with path.open(newline="") as file:
        return path, list(csv.DictReader(file))


def test_rows_and_plots(quick, tmp_path, capsys):
    assert run(tmp_path) == 0
    path, rows = read(tmp_path)
    assert [(row["op"], row["contender"]) for row in rows] == [
        (op, name) for op in ("conv2d", "linear") for name in ("ours", "eager", "vendor") if has(op, name)
    ]
    for row in rows:
        assert float(row["latency_q1_us"]) <= float(row["latency_us"]) <= float(row["latency_q3_us"])
        share = 100 * float(row["roofline_us"]) / float(row["latency_us"])
        assert float(row["percent_of_roofline"]) == pytest.approx(share, abs=0.1, rel=0.01)
        assert row["roofline"] == "a toy's peaks"
        assert row["device"] and row["torch"] == torch.__version__ and row["source"]
        assert row["contender"] != "ours" or float(row["ratio_to_ours"]) == 1.0
    assert next(row["layers"] for row in rows if row["op"] == "linear") == "2"
    for op in ("conv2d", "linear"):
        assert path.with_name(f"{path.stem}_{op}.png").stat().st_size > 1000
    assert "conv2d batch=2 channels=8" in capsys.readouterr().out


def has(op, name):
    return name != "vendor" or contenders.onednn.available(torch.float32)


def test_a_stopped_run_goes_on(quick, tmp_path, monkeypatch):
    measured = []
    rows_of = micro.rows_of

    def counted(case, *rest):
        measured.append(case)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return rows_of(case, *rest)

    monkeypatch.setattr(micro, "rows_of", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert {row["op"] for row in read(tmp_path)[1]} == {"conv2d"}
    assert run(tmp_path) == 0
    assert run(tmp_path) == 0
    assert measured == [CONV, LINEAR, LINEAR]
    assert run(tmp_path, "--contenders", "ours", "compile") == 0  # one that had not been asked for
    assert measured[3:] == [CONV, LINEAR]
    assert {row["contender"] for row in read(tmp_path)[1]} == {"ours", "compile"}


@pytest.fixture(autouse=True)
def compile_without_a_compiler(monkeypatch):
    """torch.compile traces and checks as ever, but generates no C++, which takes long."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(plain, backend="aot_eager"))


def test_rows_of_other_sources_are_dropped(quick, tmp_path, monkeypatch):
    assert run(tmp_path) == 0
    before = read(tmp_path)[1]
    monkeypatch.setattr(micro_report, "source_digest", lambda: "changed")
    assert run(tmp_path) == 0
    after = read(tmp_path)[1]
    assert len(after) == len(before)
    assert {row["source"] for row in after} == {"changed"}


def test_no_speed_where_tests_fail(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(micro, "passes_tests", lambda op, device: op != "conv2d")
    assert run(tmp_path) == 1
    assert {row["op"] for row in read(tmp_path)[1]} == {"linear"}
    out = capsys.readouterr().out
    assert "conv2d: its tests fail, so no speed is measured" in out
    assert "without a speed: conv2d" in out
    assert "conv2d batch" not in out


def test_failing_tests_are_shown(tmp_path, monkeypatch, capsys):
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test(): pass\n")
    bad.write_text("def test(): assert 1 == 2, 'a wrong kernel'\n")
    monkeypatch.setattr(micro, "files_of_tests", lambda op, device: [good])
    assert micro.passes_tests("conv2d", CPU)
    monkeypatch.setattr(micro, "files_of_tests", lambda op, device: [good, bad])
    assert not micro.passes_tests("conv2d", CPU)
    assert "a wrong kernel" in capsys.readouterr().out
    monkeypatch.setattr(micro, "files_of_tests", lambda op, device: [])
    assert not micro.passes_tests("conv2d", CPU)


def test_no_speed_where_ours_is_wrong(quick, tmp_path, monkeypatch, capsys):
    def wrong(case, sets):
        (call,) = contenders.ours(case, sets)
        return [lambda: call() * (1.001 if case.op == "conv2d" else 1)]

    monkeypatch.setitem(contenders.CONTENDERS, "ours", wrong)
    assert run(tmp_path) == 1
    assert {row["op"] for row in read(tmp_path)[1]} == {"linear"}
    out = capsys.readouterr().out
    assert "ours fails on conv2d batch=2" in out
    assert "relative error 1.0e-03" in out


def test_another_contender_that_is_wrong_takes_no_part(quick, tmp_path, monkeypatch):
    def broken(case, sets):
        raise TypeError("no such kernel\nsecond line")

    monkeypatch.setitem(
        contenders.CONTENDERS, "vendor", lambda case, sets: [lambda: sets[0]["x"] * float("nan")]
    )
    monkeypatch.setitem(contenders.CONTENDERS, "eager", broken)
    assert run(tmp_path) == 0
    for row in read(tmp_path)[1]:
        assert row["contender"] == "ours"
        assert "eager fails: no such kernel" in row["absent"]
        assert "vendor fails: relative error inf" in row["absent"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.shape()}")
def test_contenders_agree(case, dtype):
    """`prepare` compares each with a float32 result; what is absent must say why."""
    with torch.inference_mode():
        runs, errors, absent = micro.prepare(case, dtype, CPU, list(contenders.CONTENDERS))
    assert {"ours", "eager", "compile"} <= set(runs)
    assert set(runs) == set(errors)
    assert "vendor" in runs or absent[0].startswith("vendor: ")
    assert len(absent) == len(contenders.CONTENDERS) - len(runs)


def test_every_operator_of_the_networks_has_tests():
    cases = micro.select_cases(["mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224"], [1], None)
    assert {case.op for case in cases} >= {"conv2d", "depthwise_conv2d", "linear", "mlp", "attention"}
    for op in {case.op for case in cases}:
        assert micro.files_of_tests(op, torch.device("cuda")), op
        assert micro.files_of_tests(op, CPU), op


def test_select_cases_merges_layers_and_keeps_operators_together():
    cases = micro.select_cases(["resnet34"], [1, 2], ["conv2d"])
    assert {case.op for case in cases} == {"conv2d"}
    assert {case.batch for case in cases} == {1, 2}
    repeated = [layers for layers in cases.values() if len(layers) > 1]
    assert repeated
    assert all(layer.startswith("resnet34:") for layers in cases.values() for layer in layers)


@dataclass
class Product:
    """As much of a case as `error_of` asks for."""

    depth: int

    def flops(self):
        return 2.0 * self.depth * 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_that_rounding_explains(dtype):
    a, b = torch.randn(10, 64).to(dtype), torch.randn(64, 10).to(dtype)
    exact = a.double() @ b.double()
    error, allowed = micro.error_of(exact.to(dtype), exact, Product(64))
    assert error <= allowed
    one_tap_lost = (a[:, 1:].double() @ b[1:].double()).to(dtype)
    assert micro.error_of(one_tap_lost, exact, Product(64))[0] > allowed
    assert micro.error_of(exact.to(dtype)[:5], exact, Product(64))[0] == float("inf")
    assert micro.error_of(torch.full_like(a[:, :10], float("nan")), exact, Product(64))[0] == float("inf")
