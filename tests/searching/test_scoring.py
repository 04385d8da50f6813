"""Scores beside the unpruned net: the divergence from its outputs, which needs no labels."""

import math

import pytest
import torch
from nets import build

from depthfuse import Supernet
from depthfuse.config import SearchConfig
from depthfuse.data import DataConfig, bundle_of_tensors
from depthfuse.searching.journal import Journal
from depthfuse.searching.scoring import Scorer, SubnetScore, value_of
from depthfuse.searching.search import search
from depthfuse.tasks import CLASSIFICATION

CHOICES = {"layer1.0": "compact"}
SEARCH = SearchConfig(strategy="greedy", metric="divergence", blocks=2, calibration_images=0)


@pytest.fixture(scope="module")
def net():
    model, size = build("resnet")
    return Supernet(model).eval(), size


def data_of(size, labels):
    images = torch.randint(256, (80, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    config = DataConfig(batch_size=16, val_batch_size=24, holdout=0.5)
    return bundle_of_tensors(
        config, list("abcde"), (images, labels), (images[:8], labels[:8]), mean=0.0, std=1.0
    )


def outputs(supernet, data, choices):
    supernet.set_choices(choices)
    with torch.no_grad():
        return torch.cat([supernet(images) for images, _ in data.holdout_loader()]).double()


def test_divergence_is_that_of_all_held_out_images(net):
    supernet, size = net
    data = data_of(size, torch.arange(80) % 5)
    scorer = Scorer(supernet, data, lambda: None, CLASSIFICATION, divergence=True)
    score, _ = scorer(CHOICES)
    own, whole = outputs(supernet, data, CHOICES), outputs(supernet, data, {})
    log_p, log_q = whole.log_softmax(-1), own.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()  # batches of 24 and 16: no mean of means
    assert expected > 1e-3
    assert score.divergence == pytest.approx(expected, rel=1e-4)
    assert scorer({})[0].divergence == pytest.approx(0.0, abs=1e-6)
    assert Scorer(supernet, data, lambda: None, CLASSIFICATION)(CHOICES)[0].divergence is None


def test_a_search_by_divergence_does_not_look_at_labels(net):
    supernet, size = net
    labels = torch.arange(80) % 5
    data = data_of(size, labels)
    first = search(supernet, data, SEARCH)
    batches = [(images, classes.flip(0)) for images, classes in data.holdout_loader()]
    data.holdout_loader = lambda: batches
    second = search(supernet, data, SEARCH)
    assert first.spec == second.spec
    assert len(first.spec.mapping()) == 2 and first.scored > 4


def test_what_was_scored_by_another_metric_is_scored_again(net, tmp_path):
    supernet, size = net
    data, journal = data_of(size, torch.arange(80) % 5), tmp_path / "search.jsonl"
    by_loss = SearchConfig(strategy="greedy", metric="loss", blocks=2, calibration_images=0)
    search(supernet, data, by_loss, journal=journal)
    result = search(supernet, data, SEARCH, journal=journal)
    assert result.spec == search(supernet, data, SEARCH).spec
    lengths = [len(journal.read_text().splitlines())]
    search(supernet, data, SEARCH, journal=journal)
    assert [len(journal.read_text().splitlines())] == lengths  # all are known now
    assert Journal(journal).get({}).divergence == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("score", "metric", "value"),
    [
        (SubnetScore(90.0, 0.5, 0.1), "top1", 90.0),
        (SubnetScore(90.0, 0.5, 0.1), "loss", -0.5),
        (SubnetScore(90.0, 0.5, 0.1), "divergence", -0.1),
        (SubnetScore(90.0, 0.5), "divergence", -math.inf),
        (SubnetScore(90.0, math.nan), "loss", -math.inf),
    ],
)
def test_what_ranks_a_score(score, metric, value):
    assert value_of(score, metric) == value
