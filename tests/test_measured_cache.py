"""The cache of measurements: what it knows again, what it ignores, and everything that can go wrong with its files."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from depthfuse import measured_cache as cache
from depthfuse.acceleration import accelerate
from depthfuse.acceleration.running import choose as executor
from depthfuse.acceleration.running import implementations as tune
from depthfuse.checkpoint import load_json
from depthfuse.measured_cache import MeasuredCache, cache_folder

CPU = torch.device("cpu")
QUESTION = {"op": "conv", "shape": [1, 2, 3], "act": None}
ANSWER = {"winner": "gemm", "latency_ms": {"gemm": 0.25}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DEPTHFUSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "depthfuse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "depthfuse"


def test_a_user_without_a_home_measures_and_keeps_nothing(tmp_path):
    """Neither HOME nor an entry in the list of users, as in containers that run under any number."""
    code = """
        import os, pathlib, torch
        os.environ.pop("DEPTHFUSE_CACHE_DIR", None)
        os.environ.pop("XDG_CACHE_HOME", None)
        def nobody():
            raise RuntimeError("Could not determine home directory.")
        pathlib.Path.home = nobody
        import depthfuse
        from depthfuse.measured_cache import cache_folder
        assert cache_folder() is None
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU()).eval()
        x = torch.randn(3, 6)
        fast = depthfuse.accelerate(model, x)
        assert (fast(x) - model(x)).abs().max() < 1e-5
    """
    assert run_python(code, tmp_path).wait(120) == 0


def test_every_source_counts(tmp_path, monkeypatch):
    """One byte in any file below the folders, however deep, is another environment."""
    (tmp_path / "ops" / "inner").mkdir(parents=True)
    for name in ("ops/a.py", "ops/inner/b.py"):
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    digests = set()
    for name in ("ops/a.py", "ops/inner/b.py", "ops/inner/c.py"):
        (tmp_path / name).write_text("x = 2")
        cache.source_digest.cache_clear()
        digests.add(cache.source_digest(("ops",)))
    cache.source_digest.cache_clear()
    assert len(digests) == 3
    assert all((Path(cache.__file__).parent / folder).is_dir() for folder in cache.PLAN_SOURCES)


def test_answers_come_back(folder):
    MeasuredCache.of(CPU).put(QUESTION, ANSWER)
    again = MeasuredCache.of(CPU)
    assert again.get(QUESTION) == ANSWER
    assert again.get({**QUESTION, "shape": [1, 2, 4]}) is None
    again.put(QUESTION, {"winner": "onednn"})
    assert MeasuredCache.of(CPU).get(QUESTION) == {"winner": "onednn"}
    assert [path.name for path in folder.rglob("*.json")] == [again.path(QUESTION).name]


@pytest.mark.parametrize("change", ["threads", "torch", "triton", "source", "cpu", "capability"])
def test_another_environment_is_another_cache(folder, monkeypatch, change):
    MeasuredCache.of(CPU).put(QUESTION, ANSWER)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif change == "source":
        monkeypatch.setattr(cache, "source_digest", lambda sources: "another")
    elif change == "triton":
        monkeypatch.setattr(cache, "triton_version", lambda: "triton 99")
    elif change == "cpu":
        monkeypatch.setattr(cache, "device_name", lambda device: "another")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    assert MeasuredCache.of(CPU).get(QUESTION) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\0" * 200,
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"answer"', '"question"'),
        lambda text: text.replace("measured/2", "measured/0"),
        lambda text: text.replace('"threads"', '"fibres"'),
        lambda text: text.replace('"op": "conv"', '"op": "linear"'),
        lambda text: text.replace("0.25", "0.75"),
    ],
)
def test_a_damaged_file_is_logged_and_rebuilt(folder, caplog, damage):
    kept = MeasuredCache.of(CPU)
    kept.put(QUESTION, ANSWER)
    path = kept.path(QUESTION)
    path.write_text(damage(path.read_text()))
    assert kept.get(QUESTION) is None
    assert str(path) in caplog.text and caplog.records[-1].levelname == "WARNING"
    kept.put(QUESTION, ANSWER)
    assert kept.get(QUESTION) == ANSWER


def test_accelerate_survives_a_damaged_cache(folder, caplog):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval()
    x = torch.randn(3, 6)
    accelerate(model, x)
    files = list(folder.rglob("*.json"))
    for path in files:
        path.write_bytes(path.read_bytes()[:-20])
    accelerate(model, x)
    assert caplog.text.count("measuring anew") == len(files)
    assert all(json.loads(path.read_text()) for path in files)


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "file"))
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).eval()
    accelerate(model, torch.randn(3, 6))
    assert caplog.text.count("measurements are not kept") == 1


def test_threads_write_the_same_answer_at_once(folder):
    kept = MeasuredCache.of(CPU)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: kept.put(QUESTION, {"winner": str(index % 2)}), range(64)))
    assert kept.get(QUESTION)["winner"] in "01"
    assert [path.name for path in kept.folder.iterdir()] == [kept.path(QUESTION).name]


def run_python(code, folder):
    environment = {**os.environ, "DEPTHFUSE_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment)


def test_killed_while_writing(folder):
    code = f"""
        import os, signal, torch
        from depthfuse.measured_cache import MeasuredCache
        torch.set_num_threads({torch.get_num_threads()})
        kept = MeasuredCache.of(torch.device("cpu"))
        kept.put({QUESTION!r}, {ANSWER!r})
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        kept.put({QUESTION!r}, {{"winner": "half-written"}})
    """
    assert run_python(code, folder).wait(120) == -signal.SIGKILL
    kept = MeasuredCache.of(CPU)
    assert len(list(kept.folder.iterdir())) == 2  # the file, and what the killed process left beside it
    assert kept.get(QUESTION) == ANSWER
    kept.put(QUESTION, {"winner": "onednn"})
    assert kept.get(QUESTION) == {"winner": "onednn"}
    assert [path.name for path in kept.folder.iterdir()] == [kept.path(QUESTION).name]


def test_two_processes_tune_at_once(folder, monkeypatch):
    code = f"""
        import depthfuse, torch, timm
        torch.set_num_threads({torch.get_num_threads()})
        torch.manual_seed(0)
        depthfuse.accelerate(timm.create_model("test_resnet").eval(), torch.randn(1, 3, 64, 64))
    """
    processes = [run_python(code, folder) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert all(load_json(path)["format"] == cache.FORMAT for path in files)

    def refuse(*args, **kwargs):
        raise AssertionError("something was measured")

    monkeypatch.setattr(tune, "time_interleaved", refuse)
    monkeypatch.setattr(executor, "time_interleaved", refuse)
    accelerate(timm.create_model("test_resnet").eval(), torch.randn(1, 3, 64, 64))
