"""Two processes that train and score together: they see each image once, and all hold what the first one saves."""

import json

import pytest
import torch
import training_worker as worker
from processes import made_once, pair
from shards import CLASSES, IMAGES, shard_config, write_shards

from depthfuse import open_data
from depthfuse.checkpoint import load_tensors
from depthfuse.errors import CheckpointError
from depthfuse.training.evaluation import Score, calibrate, evaluate
from depthfuse.training.loop import fit, make_accelerator
from depthfuse.training.objectives import Objective

pytest.importorskip("webdataset", reason="WebDataset is an optional dependency (extra: data)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have left."""

    def make(folder):
        with pair(worker.__file__, write_shards(folder)) as processes:
            assert processes.exit_codes() == [0, 0], processes.said()

    return made_once(tmp_path_factory, "trained_by_two", make)


@pytest.fixture(scope="module")
def facts(folder):
    """By rank."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def same_weights(a, b):
    left, right = load_tensors(a)[0], load_tensors(b)[0]
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_each_image_of_a_stream_is_scored_once(folder, facts):
    first, second = (set(rank["scored"]) for rank in facts)
    assert first and second and not first & second
    assert sorted(facts[0]["scored"] + facts[1]["scored"]) == list(range(IMAGES))
    assert sorted(facts[0]["scored alone"]) == list(range(IMAGES))
    stream = open_data(shard_config(folder, val_batch_size=5), num_classes=CLASSES)
    alone = evaluate(worker.watched(stream), stream.val_loader())
    for score in (facts[0]["score"], facts[1]["score"], facts[0]["score alone"]):
        top1, loss = Score(*score)
        assert top1 == alone.top1
        assert loss == pytest.approx(alone.loss, rel=1e-6)


def test_scores_of_all_tasks_are_those_of_one_process(facts):
    alone = worker.scores_of_tasks(None)
    for rank in facts:
        for name, score in alone.items():
            assert rank["tasks"][name] == pytest.approx(list(score), rel=1e-5), name


def test_calibration_is_that_of_one_process(folder):
    stream = open_data(shard_config(folder, val_batch_size=5), num_classes=CLASSES)
    alone = worker.watched(stream)
    calibrate(alone, stream, 20)
    assert len(alone.seen) == 20
    tensors = load_tensors(folder / "calibrated0.safetensors")[0]
    for name, tensor in alone.inner.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor)
    assert same_weights(folder / "calibrated0.safetensors", folder / "calibrated1.safetensors")


@pytest.mark.parametrize("name", ["plain", "averaged"])
def test_the_score_is_that_of_the_weights_which_are_saved(name, folder, facts):
    assert same_weights(folder / f"{name}0.safetensors", folder / f"{name}1.safetensors")
    for rank in facts:
        best, again = rank[name]
        assert best == again == facts[0][name][0]


def test_all_stop_where_the_numbers_of_one_go_bad(facts):
    assert facts[0]["diverged"] == facts[1]["diverged"]
    assert (
        "TrainingDiverged: train: the loss is nan at iteration 2; first layer with such output: layer2.0.conv1"
        in facts[0]["diverged"]
    )


def test_all_stop_where_one_cannot_read_or_write(facts):
    assert facts[0]["broken"] == facts[1]["broken"] == "DataError: cannot read 2.jpg"
    assert facts[0]["no room"] == facts[1]["no room"]
    assert "CheckpointError: cannot write" in facts[0]["no room"]


def test_a_state_of_another_number_of_processes_is_refused(folder):
    data = open_data(worker.EMBEDDED, num_classes=None, in_chans=1)
    with pytest.raises(
        CheckpointError,
        match=r"plain.state .*2 process\(es\), and this run has 1: .*--nproc-per-node 2.*delete",
    ):
        fit(
            Objective(worker.net()),
            data,
            worker.TRAINING,
            make_accelerator(cpu=True),
            checkpoint=folder / "plain.state",
        )
