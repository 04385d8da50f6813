"""The proof of a GPU: order, time, what fails, and kills at any moment, with a stand-in for the work."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from on_request import on_request

from benchmarks.gpu_proof import __main__ as proof
from benchmarks.gpu_proof.journal import DONE, Journal
from benchmarks.gpu_proof.tables import write_all
from benchmarks.gpu_proof.work import NETS, Task, short, tasks

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "a card", "torch": "2.11", "triton": "3.6"}


def model_row(name, contender, ratio, ms=1.0):
    spread = {"ratio_q1": ratio, "ratio_q3": ratio}
    return {
        "model": name, "batch": 1, "contender": contender, "latency_ms": ms, "ratio_to_depthfuse": ratio, **spread
    }  # fmt: skip


def worker(*actions):
    """A process that carries out actions: a row to print, seconds to wait, or how to end."""
    lines = ["import json, os, sys, time", "sys.stdin.read()"]
    for action in actions:
        if isinstance(action, list):
            lines.append(f"print({json.dumps(action)!r}, flush=True)")
        elif isinstance(action, float):
            lines.append(f"time.sleep({action})")
        else:
            lines.append(action)
    return [sys.executable, "-c", "\n".join(lines)]


def check(name):
    row = {"op": name, "case": "only", "dtype": "float16", "state": "passed", "reason": "", "share": 0.5}
    return ["self-test", name, row]


def test_the_most_worth_knowing_comes_first():
    order = [task.name for task in tasks(rehearse=False)]
    assert len(set(order)) == len(order)
    steps = list(dict.fromkeys(task.step for task in tasks(rehearse=False)))
    assert steps == ["self-test", "models", "operators", "tuning", "models, tuned"]
    models = [task for task in tasks(rehearse=False) if task.step == "models"]
    assert [task.args[:3] for task in models[:4]] == [(net, "plain", "1") for net in NETS]
    assert all(task.fallback is not None and task.fallback.args == task.args[:3] for task in models)


def test_rows_are_on_the_disk_as_they_come_and_failures_are_noted(tmp_path):
    todo = [
        Task("self-test", ("one",), 1, 30),
        Task("self-test", ("two",), 1, 30),
        Task("self-test", ("three",), 1, 1.5, Task("self-test", ("instead",), 1, 30)),
    ]
    commands = {
        "one": worker(check("one")),
        "two": worker(check("two"), "sys.exit('no such kernel')"),
        "three": worker(check("three"), 60.0),
        "instead": worker(check("instead")),
    }
    journal = Journal.open(tmp_path, FACTS)
    proof.run(journal, todo, None, lambda task: commands[task.args[0]])
    assert journal.ended == {
        "self-test one": DONE,
        "self-test two": "no such kernel",
        "self-test three": "stopped after 2 s",
        "self-test instead": DONE,
    }
    assert [row["op"] for row in journal.of("self-test")] == ["one", "two", "three", "instead"]
    text = (tmp_path / "proof.md").read_text()
    assert "4 passed" in text and "- self-test two: no such kernel" in text
    assert Journal.open(tmp_path, FACTS) == journal
    before = (tmp_path / "journal.json").read_bytes()
    proof.run(journal, todo, None, lambda task: pytest.fail("nothing is done twice"))
    assert (tmp_path / "journal.json").read_bytes() == before


def test_time_is_kept(tmp_path, capsys):
    """A task that needs more than is left is not begun, a smaller one is; a later call has the time for both."""
    now = [0.0]
    todo = [Task("self-test", (name,), least, 30) for name, least in (("a", 30), ("b", 50), ("c", 5))]

    def command(task):
        now[0] += 20
        return worker(check(task.args[0]))

    journal = Journal.open(tmp_path, FACTS)
    proof.run(journal, todo, 1.0, command, clock=lambda: now[0])
    assert set(journal.ended) == {"self-test a", "self-test c"}
    assert "self-test b: not begun, 40 s are left" in capsys.readouterr().out
    proof.run(journal, todo, 1.0, command, clock=lambda: now[0])
    assert set(journal.ended) == {"self-test a", "self-test b", "self-test c"}


@on_request("a minute")
def test_killed_at_any_moment_it_goes_on_to_the_same_tables(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_gpu_proof import FACTS, Task, check, proof, worker, Journal, write_all\n"
        "todo = [Task('self-test', (str(i),), 1, 30) for i in range(3)]\n"
        "journal = Journal.open(Path(sys.argv[1]), FACTS)\n"
        "proof.run(journal, todo, None, lambda t: worker(check(t.args[0] + 'a'), 0.05, check(t.args[0] + 'b')))\n"
        "write_all(journal)\n"
    )
    once, often = tmp_path / "once", tmp_path / "often"
    subprocess.run([sys.executable, script, once], check=True, capture_output=True)
    kills, rest = 0, random.Random(1)
    while True:
        process = subprocess.Popen([sys.executable, script, often], stdout=subprocess.PIPE)
        process.stdout.readline()  # it has begun
        try:
            process.wait(rest.uniform(0.0, 0.25))
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 2
    names = sorted(path.name for path in once.iterdir())
    assert len(names) <= 8
    assert sorted(path.name for path in often.iterdir() if path.suffix != ".partial") == names
    for name in names:
        assert (often / name).read_bytes() == (once / name).read_bytes(), name


def test_a_damaged_journal_is_named(tmp_path):
    journal = Journal.open(tmp_path, FACTS)
    journal.add(*check("one"))
    path = tmp_path / "journal.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(Exception, match="journal.json"):
        Journal.open(tmp_path, FACTS)


def test_the_tables_say_who_is_faster(tmp_path):
    journal = Journal.open(tmp_path, FACTS)
    for name, ratio in (("depthfuse", 1.0), ("eager", 3.0), ("torch.compile", 0.9)):
        journal.add("models", name, model_row("net", name, ratio))
    entry = {"config": {"block_m": 64}, "latency_us": 5.0, "heuristic_us": 7.5}
    journal.add("tuning", "linear", {"request": "linear float16 rows=1", "entry": entry})
    write_all(journal)
    text = (tmp_path / "proof.md").read_text()
    assert (
        "| net | 1 | 1.000 |  | torch.compile | 0.90 (0.90 to 0.90) | eager 3.00, torch.compile 0.90 |"
        in text
    )
    assert "1 of 1 launches run faster than by the heuristic, at most 1.50x" in text
    assert json.loads((tmp_path / "tuned.json").read_text())["configs"] == {"linear float16 rows=1": entry}
    assert (tmp_path / "models.csv").read_text().splitlines()[1].endswith("a card,2.11,3.6")


def test_what_falls_short_is_tuned_the_worst_first():
    def row(shape, contender, ratio, percent=50.0):
        return {
            "op": "linear", "shape": shape, "contender": contender, "ratio_to_ours": ratio,
            "percent_of_roofline": percent,
        }  # fmt: skip

    rows = [
        *(row("good", name, ratio) for name, ratio in (("ours", 1.0), ("eager", 2.0))),
        *(row("slower", name, ratio) for name, ratio in (("ours", 1.0), ("eager", 1.02), ("vendor", 3.0))),
        *(row("slowest", name, ratio) for name, ratio in (("ours", 1.0), ("eager", 0.5))),
        *(row("far", name, ratio, 10.0) for name, ratio in (("ours", 1.0), ("eager", 2.0))),
    ]
    assert short(rows) == [("linear", "slowest"), ("linear", "slower"), ("linear", "far")]


@on_request("a minute")
def test_a_rehearsal_of_one_net(tmp_path, monkeypatch):
    """The real work, on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    journal = Journal.open(tmp_path, FACTS)
    wanted = ("models small merged 1", "operators small 1", "self-test attention")
    todo = [task for task in tasks(rehearse=True) if task.name in wanted]
    started = time.monotonic()
    proof.run(journal, todo, None, lambda task: proof.command_of(task, rehearse=True))
    assert journal.ended == dict.fromkeys(sorted(wanted, key=[t.name for t in todo].index), DONE), started
    assert {row["contender"] for row in journal.of("models")} == {"depthfuse", "eager", "eager channels_last"}
    assert {row["contender"] for row in journal.of("operators")} == {"ours", "eager", "vendor"}
