"""The best of a search, each trained for a short time: who is chosen, and that a kill changes nothing."""

import dataclasses
import math

import pytest
import torch
from killed_runs import assert_same_weights, kill_when_there, merge_command, run_again
from small_run import CONFIG, undisturbed
from torch.nn import functional as F

from depthfuse import load
from depthfuse.checkpoint import load_json, save_json
from depthfuse.config import FinetuneConfig, SearchConfig, from_dict, to_dict
from depthfuse.errors import CheckpointError, ConfigError
from depthfuse.runs import finalists
from depthfuse.runs.run import Run
from depthfuse.tasks import CLASSIFICATION
from depthfuse.training.loop import make_accelerator

ALL = [{"a": "drop"}, {"b": "dense"}, {"a": "drop", "b": "compact"}]
SEVERAL = dataclasses.replace(CONFIG, search=dataclasses.replace(CONFIG.search, finalists=2))


class Trainings:
    """In the place of trainings: a "net" is its choices; each leaves a checkpoint, and may be cut short."""

    def __init__(self, folder, found, cut_at=None):
        self.folder, self.found, self.cut_at = folder, dict(enumerate(found)), cut_at
        self.stages = []

    def __call__(self, choices, stage):
        self.stages.append(stage)
        (self.folder / f"{stage}.state").touch()
        if stage == self.cut_at:
            raise KeyboardInterrupt
        return choices, 2.5

    def decide(self):
        path = self.folder / "finalists.json"
        return finalists.decide(
            path, self, lambda net: self.found[ALL.index(net)], make_accelerator(cpu=True)
        )


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([0.3, 0.1, 0.2], 1),
        ([0.1, 0.1, 0.2], 0),
        ([math.nan, math.inf, 0.2], 2),
        ([math.nan, math.nan, math.inf], 0),
        ([0.5, -math.inf, math.nan], 1),
    ],
)
def test_the_one_that_diverges_least_is_chosen(tmp_path, found, chosen):
    finalists.enter(tmp_path / "finalists.json", ALL)
    assert Trainings(tmp_path, found).decide() == ALL[chosen]
    rows = load_json(tmp_path / "finalists.json", finalists.SHAPE)
    assert [float(row["divergence"]) for row in rows] == pytest.approx(found, nan_ok=True)
    assert [row["seconds"] for row in rows] == [2.5] * 3
    assert not list(tmp_path.glob("*.state"))


def test_those_that_are_done_are_not_trained_again(tmp_path):
    finalists.enter(tmp_path / "finalists.json", ALL)
    cut = Trainings(tmp_path, [0.3, 0.2, 0.1], cut_at="finalists-2")
    with pytest.raises(KeyboardInterrupt):
        cut.decide()
    assert (tmp_path / "finalists-2.state").exists()
    again = Trainings(tmp_path, [9.0, 0.2, 0.25])
    assert again.decide() == ALL[1]  # the first has kept its 0.3
    assert again.stages == ["finalists-2", "finalists-3"]
    assert not list(tmp_path.glob("*.state"))


def test_a_damaged_file_is_refused(tmp_path):
    save_json(tmp_path / "finalists.json", [{"choices": {"a": 1}}])
    with pytest.raises(CheckpointError, match="choices"):
        Trainings(tmp_path, [0.3]).decide()


def test_a_finalist_trains_as_the_chosen_subnet_but_for_a_short_time():
    settings = FinetuneConfig(epochs=9, lr=2e-4, features=1.0, warmup_epochs=1.0, lambda_schedule="cosine")
    short = finalists.short(settings, SearchConfig(finalist_epochs=2))
    kept = {"epochs": 9, "warmup_epochs": 1.0, "lambda_schedule": "cosine"}
    assert dataclasses.replace(short, **kept) == settings
    assert short.epochs == 2 and short.warmup_epochs == pytest.approx(0.2) and short.lambda_schedule == "none"


@pytest.mark.parametrize("name", ["finalists", "finalist_epochs"])
def test_none_is_no_number_of_finalists(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not 0"):
        SearchConfig(**{name: 0})


def test_configs_of_before_have_no_finalists():
    document = to_dict(CONFIG)
    del document["search"]["finalists"], document["search"]["finalist_epochs"]
    assert from_dict(type(CONFIG), document, complete=True) == CONFIG


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return undisturbed(SEVERAL, tmp_path_factory.mktemp("finalists") / "run")


def test_a_run_trains_them_and_goes_on_with_the_best(finished):
    rows = load_json(finished / "finalists.json", finalists.SHAPE)
    assert len(rows) == 2 and rows[0]["choices"] != rows[1]["choices"]
    best = min(rows, key=lambda row: row["divergence"])
    run = Run(dataclasses.replace(SEVERAL, out=finished))
    assert dict(run.search().mapping()) == best["choices"]
    assert set(run.finetune().blocks) == set(best["choices"])
    assert load(finished) is not None
    for number in (1, 2):
        (score,) = [r for r in load_json(finished / f"history_finalists-{number}.json") if "top1" in r]
        assert score["epoch"] == 1
    assert not list(finished.glob("*.state"))
    page = (finished / "report.html").read_text()
    assert all(f"{row['divergence']:.4f}" in page for row in rows)


def test_the_divergence_is_that_of_the_outputs_on_training_images(finished):
    run = Run(dataclasses.replace(SEVERAL, out=finished))
    original, net = run.baseline().eval(), run.finetune().eval()
    images = torch.cat([x for x, _ in run.data.train_loader(seed=3, epoch=1)])
    assert len(images) < 1536  # all of them
    with torch.no_grad():
        wanted, given = (n(images).double().log_softmax(1) for n in (original, net))
    wanted = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
    found = finalists.divergence(original, net.train(), data=run.data, task=CLASSIFICATION, seed=3, epoch=1)
    assert found == pytest.approx(float(wanted), rel=1e-4)
    assert net.training  # as it was
    same = finalists.divergence(original, original, data=run.data, task=CLASSIFICATION, seed=3, epoch=1)
    assert same == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("file", ["finalists-1.state", "finalists-2.state"])
def test_killed_among_them_it_ends_with_the_same_bits(finished, tmp_path, file):
    command, out = merge_command(SEVERAL, finished, tmp_path)
    kill_when_there(command, out / file)
    assert not (out / "subnet.json").exists()
    run_again(command)
    assert_same_weights(out, finished, ("baseline", "supernet", "finetune", "merged"))
    assert (out / "subnet.json").read_text() == (finished / "subnet.json").read_text()
    got, wanted = (load_json(folder / "finalists.json") for folder in (out, finished))
    assert [{**row, "seconds": 0.0} for row in got] == [{**row, "seconds": 0.0} for row in wanted]


def test_without_training_the_best_by_score_is_taken(finished, tmp_path):
    config = dataclasses.replace(SEVERAL, out=tmp_path / "run", train=False, start_from=finished)
    spec = Run(config, until="search").search()
    assert dict(spec.mapping()) == load_json(finished / "finalists.json")[0]["choices"]
    assert not (tmp_path / "run" / "finalists.json").exists()
