"""The whole job on tasks other than classification: a segmenter and a detector survive SIGKILL with the same bits."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fake_clock import Clock
from on_request import on_request
from small_run import CONFIG
from task_nets import config_of

from depthfuse import load, origins
from depthfuse.checkpoint import load_json, load_tensors
from depthfuse.config import load_yaml, to_yaml
from depthfuse.data import DataConfig, bundle_of_tensors
from depthfuse.data.shapes import draw
from depthfuse.errors import ConfigError, DataError, TaskError, TrainingDiverged
from depthfuse.runs.run import prune
from depthfuse.tasks import TASKS, TaskOfFunctions

TESTS = Path(__file__).resolve().parents[1]
MODELS = {"segmentation": "task_nets:build_segmenter", "detection": "task_nets:build_detector"}


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.setattr(origins, "_allowed", set(MODELS.values()))


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


def start(config: Path, out: Path, task: str) -> subprocess.Popen:
    words = ["--config", config, "--out", out, "--model", MODELS[task], "--task", task, "--quiet"]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    return subprocess.Popen(
        [sys.executable, "-m", "depthfuse.cli", "prune", *words],
        env={**os.environ, **paths, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@on_request("two minutes")
@pytest.mark.parametrize(
    ("task", "metric", "moment"),
    [("segmentation", "mean IoU", "supernet.state"), ("detection", "AP50", "finetune.state")],
)
def test_a_run_killed_once_and_resumed(task, metric, moment, clock, tmp_path):
    whole, out, file = tmp_path / "whole", tmp_path / "run", tmp_path / "config.yaml"
    prune(dataclasses.replace(config_of(task), out=whole))
    # the same latency table in both: two measurements never agree to the last digit
    latency = dataclasses.replace(CONFIG.latency, table=whole / "latency.json")
    file.write_text(to_yaml(dataclasses.replace(config_of(task), latency=latency)))
    process = start(file, out, task)
    deadline = time.monotonic() + 240
    while not (out / moment).exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / moment.replace("state", "safetensors")).exists()
    resumed = start(file, out, task)
    printed = resumed.communicate(timeout=240)[0]
    assert resumed.returncode == 0, printed
    assert metric in printed and "top-1" not in printed
    assert (out / "subnet.json").read_text() == (whole / "subnet.json").read_text()
    for name in ("baseline", "supernet", "finetune", "merged"):
        got, wanted = (load_tensors(folder / f"{name}.safetensors")[0] for folder in (out, whole))
        assert set(got) == set(wanted) and all(torch.equal(got[key], wanted[key]) for key in wanted), name

    results = load_json(out / "results.json")
    rows = {row["net"]: row for row in results["rows"]}
    assert results["metric"] == metric and rows["baseline"]["top1"] == rows["baseline accelerated"]["top1"]
    for name in ("merged", "merged accelerated"):  # exact but for rounding, which may flip a pixel or a box
        assert rows[name]["top1"] == pytest.approx(rows["pruned"]["top1"], abs=0.1)
    text = (out / "report.md").read_text()
    assert f"| net | {metric} % |" in text and "top-1" not in text
    head = next(csv.reader((out / "metrics.csv").open()))
    assert {TASKS[task].key, f"{TASKS[task].key}_full"} < set(head) and "top1" not in head
    assert f"{TASKS[task].key}_holdout" in (out / "front.csv").read_text()
    assert not list(out.glob("*.state")) and not list(out.glob(".*"))
    merged = load(out)(torch.zeros(2, 3, 32, 32))
    shape = {"segmentation": (2, 3, 4, 4), "detection": (2, 6, 4, 4)}[task]
    assert TASKS[task].read(merged).shape == shape


def test_embeddings_of_a_classifier_s_features(clock, tmp_path):
    data = dataclasses.replace(CONFIG.data, max_train_images=320)
    config = dataclasses.replace(CONFIG, task="embedding", data=data, out=tmp_path / "run")
    run = prune(config, "merge")
    assert run.merge()(torch.zeros(2, 1, 28, 28)).shape == (2, 24)
    assert "recall1" in next(csv.reader((tmp_path / "run" / "front.csv").open()))[2]


def own_task(fails_at=None):
    """A segmenter that learns how much of each image is covered, by two functions.

    Its loss is NaN at the batch of that number. Batches are counted, not calls: the expected time is measured by
    as many calls on one batch as a clock asks for.
    """
    seen = []

    def share(output):
        return output.softmax(1)[:, 1:].sum(1).mean((1, 2))

    def loss(output, masks):
        if not any(torch.equal(masks, before) for before in seen):
            seen.append(masks.clone())
        value = F.mse_loss(share(output), (masks > 0).float().mean((1, 2)))
        return value * (float("nan") if len(seen) == fails_at and torch.equal(masks, seen[-1]) else 1.0)

    def quality(output, masks):
        return 1.0 - (share(output) - (masks > 0).float().mean((1, 2))).abs()

    return TaskOfFunctions(loss, quality, name="coverage", metric="coverage", targets="masks")


def test_a_task_and_data_of_one_s_own(tmp_path):
    pairs = [draw(split, 32, 1)[:2] for split in ("train", "val")]
    settings = DataConfig(data="mine", batch_size=32, max_train_images=128, holdout=0.25)
    data = bundle_of_tensors(settings, ["background", "rectangle", "disc"], *pairs)
    config = dataclasses.replace(config_of("segmentation"), out=tmp_path / "run")
    task = own_task()
    prune(config, "baseline", task=task, data=data)
    saved = load_yaml(tmp_path / "run" / "config.yaml", complete=True)
    assert saved.task == "coverage" and saved.data.data == "mine"
    history = load_json(tmp_path / "run" / "history_baseline.json")
    assert 0 < history[-1]["coverage"] <= 100
    prune(config, "baseline", task=task, data=data)  # goes on
    with pytest.raises(ConfigError, match=r"another configuration \(task, data differ\)"):
        prune(config, "baseline")


@pytest.mark.parametrize("fails_at", [1, 4])
def test_a_loss_that_is_nan_leaves_nothing_half_written(fails_at, tmp_path):
    """The first call is the check before anything is written."""
    out = tmp_path / "run"
    config = dataclasses.replace(config_of("segmentation"), out=out)
    with pytest.raises(
        TrainingDiverged, match="the loss of coverage is nan" if fails_at == 1 else "iteration 2"
    ):
        prune(config, "baseline", task=own_task(fails_at))
    left = sorted(path.name for path in out.iterdir()) if out.exists() else []
    assert left == ([] if fails_at == 1 else ["baseline.state", "config.yaml", "feeding.json"])
    if fails_at > 1:  # what was saved is from before, and goes on
        prune(config, "baseline", task=own_task())
        assert (out / "baseline.safetensors").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    good = dataclasses.replace(config_of("segmentation"), out=out)
    mixed = dataclasses.replace(good.data, mixup=0.2)
    for changes, error, message in (
        (
            {"task": "detection"},
            TaskError,
            r"returns|detection takes \[N, 4 \+ classes, h, w\] = \[2, 6, h, w\]",
        ),
        ({"task": "classification"}, TaskError, r"classification takes logits \[N, classes\] = \[2, 2\]"),
        ({"data": DataConfig(), "model": "resnet18"}, DataError, "and masks are needed"),
        ({"model": "resnet18"}, TaskError, r"\[2, 3, h, w\]; the model gives \[2, 3\] float32"),
        ({"task": "segment"}, TaskError, "unknown task 'segment'"),
        ({"data": mixed}, ConfigError, "mixup and cutmix mix classes"),
    ):
        with pytest.raises(error, match=message):
            prune(dataclasses.replace(good, **changes))
        assert not out.exists()


def test_a_run_of_an_earlier_version_is_of_classification(tmp_path):
    out = tmp_path / "run"
    config = dataclasses.replace(CONFIG, out=out)
    out.mkdir()
    text = to_yaml(config)
    (out / "config.yaml").write_text(text.replace("task: classification\n", ""))
    assert "task:" not in (out / "config.yaml").read_text()
    assert load_yaml(out / "config.yaml", complete=True) == config
