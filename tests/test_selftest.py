"""The self-test: it passes what is right, finds what is wrong, and what it finds is left to PyTorch."""

import importlib
import json
import re
import sys

import pytest
import torch

from depthfuse.cli import main
from depthfuse.errors import BackendError
from depthfuse.fused.layers import FusedLinear
from depthfuse.ops import trust
from depthfuse.selftest import run
from depthfuse.selftest.cases import CASES, OPS
from depthfuse.selftest.run import check, check_op, self_test

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
CPU = torch.device("cpu")
REAL = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if REAL else CPU
pytestmark = [pytest.mark.gpu] if REAL else []


@pytest.fixture
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(trust, "_failed", {})
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))
    trust._read_verdict.cache_clear()
    yield
    trust._read_verdict.cache_clear()


def test_every_op_that_is_declared_is_tested():
    declared = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                if name.startswith("depthfuse::")}  # fmt: skip
    assert declared == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_kernels_pass(op):
    checks = list(check_op(op, DEVICE, "triton"))
    assert {c.state for c in checks} <= {"passed", "refused"}, checks
    assert {c.dtype for c in checks if c.state == "passed"} >= {"float16", "float32"}
    for each in checks:
        assert (each.share is None) or 0 < each.share <= 1
        if each.state == "refused":
            assert not REAL and each.dtype == "bfloat16"


@pytest.mark.parametrize("op", OPS)
def test_what_runs_in_their_place_passes(op):
    assert {c.state for c in check_op(op, DEVICE, "reference")} == {"passed"}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda y: y + 1, "integers, whose sums are exact, are off by 1"),
        (lambda y: y * float("nan"), "integers, whose sums are exact, are off by nan"),
        (
            lambda y: torch.where(y.abs() > 20, y, y * 1.01),
            "the error is .* times what rounding allows|are off by",
        ),
    ],
)
def test_a_wrong_kernel_is_found(broken, reason, monkeypatch):
    kernel = importlib.import_module("depthfuse.kernels.linear")
    right = kernel.linear
    monkeypatch.setattr(kernel, "linear", lambda *args, **kwargs: broken(right(*args, **kwargs)))
    case = next(c for c in CASES if c.op == "linear")
    found = check(case, torch.float32, DEVICE, "triton")
    assert found.state == "failed"
    assert re.search(reason, found.reason), found.reason


def test_an_op_that_crashes_or_hangs_takes_nothing_with_it(nothing_known, monkeypatch, tmp_path):
    """The child dies after one check; the others of its op count as failed, other ops are tested all the same."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys, time\n"
        "op = sys.argv[3]\n"
        "first = dict(op=op, case='rows of tokens', dtype='float16', state='passed', reason='', share=0.5)\n"
        "print(json.dumps(first), flush=True)\n"
        "os.abort() if op == 'linear' else time.sleep(60)\n"
    )
    real = sys.executable
    monkeypatch.setattr(run.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {real} {child} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    kept = []
    monkeypatch.setattr(run, "keep_verdict", lambda op, device, failed: kept.append((op, failed)))
    monkeypatch.setattr(run, "tested_backend", lambda device: "triton")
    seen = []
    checks = self_test("cpu", ["linear", "mlp"], limit_s=2.0, report=seen.append)
    assert seen == checks
    linear = [c for c in checks if c.op == "linear"]
    assert [c.state for c in linear].count("passed") == 1
    assert all("the process ended with -6" in c.reason for c in linear if c.state == "failed")
    assert all("more than 2 s" in c.reason for c in checks if c.op == "mlp" and c.state == "failed")
    assert {op for op, failed in kept if failed} == {"linear", "mlp"}


def test_what_failed_is_left_to_pytorch_also_in_the_next_process(nothing_known, monkeypatch, caplog):
    trust.keep_verdict("linear", DEVICE, {torch.float16: "rows of tokens: wrong"})
    monkeypatch.setattr(trust, "_failed", {})  # as in another process
    half, single = (
        FusedLinear(torch.ones(4, 8, dtype=d, device=DEVICE)) for d in (torch.float16, torch.float32)
    )
    # the interpreter, which no user's model runs by, keeps no book
    read = trust._read_verdict
    read.cache_clear()
    if not REAL:
        read("linear", DEVICE)
    for module, taken in ((half, False), (single, True)):
        module.backend = "triton"
        x = torch.ones(3, 8, dtype=module.weight.dtype, device=DEVICE)
        if taken:
            assert module.candidates(x.shape) == ["triton"]
            module(x)
        else:
            with pytest.raises(
                BackendError, match="where it failed .in the self-test: rows of tokens: wrong"
            ):
                module.candidates(x.shape)
            with pytest.raises(BackendError, match="where it failed"):
                module(x)
    assert caplog.text.count("uses PyTorch: its kernel failed") == 2
    trust.keep_verdict("linear", DEVICE, {})  # a later test passed
    assert half.candidates(torch.Size((3, 8))) == ["triton"]


def test_the_command(nothing_known, monkeypatch, capsys):
    def tested(device, report):
        found = [
            run.Check(
                "linear",
                "rows of tokens",
                "float16",
                "failed",
                "the error is 3 times what rounding allows",
                3.0,
            ),
            run.Check("linear", "rows of tokens", "float32", "passed", share=0.25),
        ]
        for each in found:
            report(each)
        return found

    monkeypatch.setattr(run, "self_test", tested)
    assert main(["env", "--selftest"]) == 1
    out = capsys.readouterr().out
    assert "failed, 3.00 of its bound" in out and "passed, 0.25 of its bound" in out
    assert "failed: linear, rows of tokens, float16: the error is 3 times what rounding allows" in out
    assert "1 passed, 1 failed, 0 refused" in out
    assert main(["env", "--selftest", "--device", "cuda:7"]) == 2
    assert "--device cuda:7 is not here; expected one of" in capsys.readouterr().err


def test_unknown_ops_are_named():
    with pytest.raises(ValueError, match="unknown ops abacus; expected some of conv2d, winograd_conv2d"):
        self_test("cpu", ["abacus"])


def test_the_child_prints_a_check_a_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "attention", "cpu", "reference"])
    run.main()
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["passed"] * 3
