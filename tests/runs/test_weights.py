"""Weights of other classes: all but the classifier is taken over, and the baseline is trained from there."""

import dataclasses
import sys

import pytest
import timm
import torch
from killed_runs import kill_when_there, run_again
from on_request import on_request
from own_code import BLOCK
from safetensors.torch import save_file
from small_run import CONFIG

from depthfuse import ModelSource, origins
from depthfuse.checkpoint import load_foreign_tensors, load_tensors
from depthfuse.config import parse_model_kwargs, to_yaml
from depthfuse.errors import CheckpointError
from depthfuse.runs.found import history_of
from depthfuse.runs.run import Run, prune
from depthfuse.runs.weights import take_given, unfit_classifier

KWARGS = parse_model_kwargs(CONFIG.model_kwargs)
OWN = (
    BLOCK
    + """

def build(num_classes=3):
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), Block(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes)
    )
"""
)


def source(classes, name="resnet18", **changes):
    return ModelSource.make(
        name, **{**(KWARGS if name == "resnet18" else {}), **changes, "num_classes": classes}
    )


@pytest.fixture
def other_classes(tmp_path):
    """A file of the small ResNet with 7 classes."""
    torch.manual_seed(7)
    path = tmp_path / "seven.safetensors"
    save_file(source(7).build().state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("resnet18", {"fc.weight", "fc.bias"}),
        (
            "deit_tiny_distilled_patch16_224",
            {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"},
        ),
        ("torchvision:mobilenet_v2", {"classifier.1.weight", "classifier.1.bias"}),
        ("torchvision:fcn_resnet50", {"classifier.4.weight", "classifier.4.bias"}),
        ("own_weights:build", {"4.weight", "4.bias"}),
    ],
)
def test_the_classifier_is_what_the_number_of_classes_changes(name, classifier, tmp_path, monkeypatch):
    (tmp_path / "own_weights.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(origins, "_allowed", {"own_weights:build"})
    given = source(21, name).build_shapes().state_dict()
    assert set(unfit_classifier(source(10, name), given, "there")) == classifier
    assert unfit_classifier(source(21, name), given, "there") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv1.weight"), "lacks conv1.weight"),
        (lambda t: t.update(more=torch.zeros(1)), "has more besides"),
        (
            lambda t: t.update({"conv1.weight": torch.zeros(8, 3, 7, 7)}),
            r"conv1.weight is \[8, 3, 7, 7\] there",
        ),
        (
            lambda t: t.update({"fc.bias": torch.zeros(10)}),
            r"fc.weight is \[7, 24\] there",
        ),  # one of the two alone
        (
            lambda t: t.update({"fc.weight": torch.zeros(7, 12)}),
            r"fc.weight is \[7, 12\] there",
        ),  # of other features
        (lambda t: t.pop("fc.bias"), "lacks fc.bias"),
    ],
)
def test_anything_else_is_refused_by_name(change, message):
    given = source(7).build().state_dict()
    change(given)
    with pytest.raises(
        CheckpointError, match=f"w.safetensors holds the weights of another model: .*{message}"
    ):
        unfit_classifier(source(10), given, "w.safetensors")


def test_weights_of_other_classes_start_the_baseline(other_classes, tmp_path, caplog):
    given = load_foreign_tensors(other_classes)
    model, fresh = source(10).build(), source(10).build()
    fresh.load_state_dict(model.state_dict())
    with caplog.at_level("INFO"):
        assert not take_given(model, source(10), other_classes, pretrained=False)
    assert (
        "seven.safetensors has other classes (fc.weight [7, 24] there, [10, 24] here, fc.bias" in caplog.text
    )
    for name, tensor in model.state_dict().items():
        expected = fresh.state_dict()[name] if name.startswith("fc.") else given[name]
        assert torch.equal(tensor, expected), name


@pytest.fixture
def local_weights(tmp_path, monkeypatch):
    """timm's own loading of pretrained weights, from a file here: a ResNet of 1,000 classes for colour images."""
    torch.manual_seed(3)
    path = tmp_path / "timm.safetensors"
    kwargs = {name: value for name, value in KWARGS.items() if name != "in_chans"}
    save_file(timm.create_model("resnet18", **kwargs).state_dict(), path)
    create = timm.create_model

    def create_model(name, pretrained=False, **arguments):
        overlay = {"file": str(path)} if pretrained else None
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    return path


def test_pretrained_weights_follow_the_same_rule(local_weights):
    given = load_foreign_tensors(local_weights)
    model = source(10).build()
    head = model.fc.weight.clone()
    assert not take_given(model, source(10), None, pretrained=True)
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.layer2[0].conv1.weight, given["layer2.0.conv1.weight"])
    assert torch.allclose(
        model.conv1.weight, given["conv1.weight"].sum(1, keepdim=True)
    )  # one channel, by timm
    whole = source(1000).build()
    assert take_given(whole, source(1000), None, pretrained=True)
    assert torch.equal(whole.fc.weight, given["fc.weight"])
    features = source(0).build()  # without a classifier nothing is left to train
    assert take_given(features, source(0), None, pretrained=True)
    assert torch.equal(features.layer2[0].conv1.weight, given["layer2.0.conv1.weight"])


def test_a_pretrained_model_of_other_classes_is_trained_before_it_is_a_baseline(local_weights, tmp_path):
    run = prune(dataclasses.replace(CONFIG, out=tmp_path / "run", pretrained=True), until="baseline")
    rows = [row for row in history_of(run.dir) if row["stage"] == "baseline"]
    assert rows and rows[-1]["epoch"] == CONFIG.baseline.epochs


@on_request("half a minute")
def test_killed_on_the_way_it_ends_with_the_same_bits(other_classes, tmp_path):
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    settings = dataclasses.replace(CONFIG, weights=other_classes)
    whole = Run(dataclasses.replace(settings, out=tmp_path / "whole")).baseline().state_dict()
    config.write_text(to_yaml(settings))
    command = [sys.executable, "-m", "depthfuse.cli", "baseline", "--config", config, "--out", out]
    kill_when_there(command, out / "baseline.state")
    assert not (out / "baseline.safetensors").exists()
    assert "going on from iteration" in run_again(command)
    got = load_tensors(out / "baseline.safetensors")[0]
    assert all(torch.equal(got[name], whole[name]) for name in whole)
    assert not torch.equal(got["conv1.weight"], load_foreign_tensors(other_classes)["conv1.weight"])
