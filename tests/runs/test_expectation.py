"""What a run is expected to take: counted by hand here, of a pace that is given; told before it starts."""

import dataclasses
import logging

import pytest
import torch
from small_run import CONFIG
from torch import nn

from depthfuse import Supernet
from depthfuse.runs import expectation
from depthfuse.runs.expectation import Pace, duration, expected_seconds, measure_pace, tell
from depthfuse.runs.run import Run
from depthfuse.training.objectives import Objective

PACE = Pace(training=3.0, forward=1.0)  # seconds an image
# of CONFIG: 576 images to train on in 9 batches, 64 held out in one, 2,000 to validate on in batches of 250
BLOCKS, CANDIDATES = 4, 12


@pytest.fixture
def run(tmp_path):
    return Run(dataclasses.replace(CONFIG, out=tmp_path / "run"))


def expected(run, until):
    return expected_seconds(run.config, run.data, run.source, PACE, until)


def told(run, until):
    tell(run.config, run.data, run.source, run.task, run.accelerator, until)


def held(run):
    return len(run.data.holdout_loader()) * run.data.config.val_batch_size


def test_every_stage_is_counted(run):
    whole = 9 * 64
    options = Supernet(run.source.build()).options()
    assert (len(options), sum(map(len, options.values()))) == (BLOCKS, CANDIDATES)
    validated = len(run.data.val_loader()) * run.data.config.val_batch_size
    assert expected(run, "compare") == {
        "baseline": whole * 3 + held(run),
        "supernet": whole * 3 * 3 + 2 * held(run),  # the full, the pruned and one random subnet
        "search": 8 * (64 + held(run)),  # 4 subnets in the first generation, and 4 in one more
        "finetune": 2 * (whole * (3 + 1) + held(run)),  # with a teacher
        "compare": 5 * validated,
    }


def test_what_is_fitted_and_not_trained_takes_no_epochs(run):
    search = dataclasses.replace(run.config.search, strategy="milp", best=3)
    run.config = dataclasses.replace(run.config, start="fit", train=False, search=search)
    seconds = expected(run, "merge")
    assert seconds["supernet"] == BLOCKS * 64
    assert seconds["search"] == (1 + CANDIDATES + 3) * (64 + held(run))
    assert seconds["finetune"] == BLOCKS * 64
    assert "compare" not in seconds


def test_what_is_done_is_left_out(run):
    (run.dir / "baseline.safetensors").touch()
    assert list(expected(run, "search")) == ["supernet", "search"]


def test_a_finished_run_is_not_timed(run, caplog, monkeypatch):
    monkeypatch.delattr(expectation, "measure_pace")
    (run.dir / "baseline.safetensors").touch()
    with caplog.at_level(logging.INFO, "depthfuse"):
        told(run, "baseline")
    assert not caplog.records


def test_no_held_out_images_are_no_fault_of_here(tmp_path):
    data = dataclasses.replace(CONFIG.data, max_train_images=64, holdout=0.0)
    run = Run(dataclasses.replace(CONFIG, data=data, out=tmp_path / "run"))
    assert expected(run, "baseline") == {"baseline": 64 * 3}


def test_the_pace_leaves_the_net_as_it_was(run):
    net = run.build()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pace = measure_pace(net, Objective(net), run.data, torch.device("cpu"))
    assert 0 < pace.forward < pace.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_it_is_told_where_somebody_reads_it(run, caplog, monkeypatch):
    monkeypatch.setattr(expectation, "measure_pace", lambda *args: PACE)
    with caplog.at_level(logging.WARNING, "depthfuse"):
        told(run, "baseline")
    assert not caplog.records
    with caplog.at_level(logging.INFO, "depthfuse"):
        told(run, "baseline")
    seconds = 9 * 64 * 3 + held(run)
    assert f"expected: about {seconds / 60:.0f} min (baseline {seconds / 60:.0f} min)" in caplog.text


def test_durations_in_words():
    assert [duration(s) for s in (4.4, 89, 91, 3600, 5400, 36000)] == [
        "4 s",
        "89 s",
        "2 min",
        "60 min",
        "1.5 h",
        "10.0 h",
    ]
