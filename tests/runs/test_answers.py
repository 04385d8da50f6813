"""A folder of images without classes to its report: the original net's answers are the targets of all stages."""

import csv
import dataclasses
import shutil
import sys

import numpy as np
import pytest
import torch
from killed_runs import assert_same_weights, kill_when_there, run_again
from on_request import on_request
from PIL import Image
from safetensors.torch import save_file
from small_run import CONFIG, undisturbed

from depthfuse import ModelSource, PruneConfig
from depthfuse.checkpoint import load_json, load_tensors
from depthfuse.config import CompareConfig, parse_model_kwargs, to_yaml
from depthfuse.data import DataConfig
from depthfuse.errors import ConfigError, DataError
from depthfuse.rivals.compare import compare
from depthfuse.runs.reopening import reopen
from depthfuse.runs.run import Run

CLASSES = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """120 images in one folder: stripes of several widths, and noise."""
    root, rng = tmp_path_factory.mktemp("unsorted"), np.random.RandomState(0)
    for number in range(120):
        stripes = 120 * ((np.arange(28) // (1 + number % 6)) % 2)[None].repeat(28, 0)
        Image.fromarray((stripes + rng.randint(0, 120, (28, 28))).astype(np.uint8)).save(
            root / f"{number}.png"
        )
    return root


@pytest.fixture(scope="module")
def config(images, tmp_path_factory):
    kwargs = parse_model_kwargs((*CONFIG.model_kwargs, f"num_classes={CLASSES}"))
    torch.manual_seed(1)
    weights = tmp_path_factory.mktemp("weights") / "w.safetensors"
    model = ModelSource.make("resnet18", **kwargs).build()
    with torch.no_grad():  # answers of several classes
        for batch in torch.randn(20, 16, 1, 28, 28):
            model.train()(batch)
        model.fc.weight *= 20
    save_file(model.state_dict(), weights)
    return dataclasses.replace(
        CONFIG,
        model_kwargs=(*CONFIG.model_kwargs, f"num_classes={CLASSES}"),
        weights=weights,
        data=DataConfig(data=str(images), img_size=28, batch_size=16, holdout=0.2),
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return undisturbed(config, tmp_path_factory.mktemp("answers") / "run")


def test_from_a_flat_folder_to_the_report(finished, config):
    results = load_json(finished / "results.json")
    rows = {row["net"]: row["top1"] for row in results["rows"]}
    assert results["metric"] == "agreement" and rows["baseline"] == 100.0 > rows["merged"]
    report = (finished / "report.md").read_text()
    assert "| agreement % |" in report and "The images have no classes" in report and "top-1" not in report
    assert "agreement_holdout" in next(csv.reader((finished / "front.csv").open()))
    assert any(name.startswith("agreement") for name in next(csv.reader((finished / "metrics.csv").open())))
    answers = load_tensors(finished / "answers.safetensors")[0]
    assert {name: len(given) for name, given in answers.items()} == {"train": 86, "holdout": 22, "val": 12}
    assert len(torch.cat(list(answers.values())).unique()) > 1
    run = Run(dataclasses.replace(config, out=finished))
    assert not run.data.labelled
    model = run.baseline().eval()
    assert run.data.labelled
    for images, labels in run.data.val_loader():
        with torch.no_grad():
            assert torch.equal(model(images).argmax(1), labels)
    data, task = reopen(finished)
    assert data.labelled and task.metric == "agreement"
    assert torch.equal(torch.cat([labels for _, labels in data.holdout_loader()]), answers["holdout"])


@on_request("half a minute")
def test_killed_on_the_way_it_ends_with_the_same_bits(finished, config, tmp_path):
    out, file = tmp_path / "run", tmp_path / "config.yaml"
    latency = dataclasses.replace(CONFIG.latency, table=finished / "latency.json")
    file.write_text(to_yaml(dataclasses.replace(config, latency=latency)))
    command = [sys.executable, "-m", "depthfuse.cli", "merge", "--config", file, "--out", out]
    kill_when_there(command, out / "answers.safetensors")
    assert not (out / "supernet.safetensors").exists()
    run_again(command)
    assert_same_weights(out, finished, ("answers", "baseline", "supernet", "finetune", "merged"))


def test_in_memory_gives_the_same_answers(finished, config, tmp_path):
    data = dataclasses.replace(config.data, in_memory=True)
    run = Run(dataclasses.replace(config, data=data, out=tmp_path / "run"))
    run.baseline()
    got, wanted = (load_tensors(folder / "answers.safetensors")[0] for folder in (run.dir, finished))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_images_that_came_later_are_noticed(finished, config, images, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(images, more)
    shutil.copy(more / "1.png", more / "999.png")
    out = tmp_path / "run"
    data = dataclasses.replace(config.data, data=str(more))
    run = Run(dataclasses.replace(config, data=data, out=out))
    for name in ("baseline", "answers"):
        shutil.copy(finished / f"{name}.safetensors", out / f"{name}.safetensors")
    with pytest.raises(DataError, match=r"answers.safetensors answers for other images: .* of train. Were"):
        run.baseline()


def refused(config: PruneConfig, tmp_path, message, **changes):
    with pytest.raises(ConfigError, match=message):
        Run(dataclasses.replace(config, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_without_finished_weights_it_says_what_to_give(config, tmp_path):
    refused(
        config,
        tmp_path,
        r"no classes: .* Give its weights \(--weights FILE, or --pretrained\), or sort",
        weights=None,
    )
    seven = tuple(text.replace(f"={CLASSES}", "=7") for text in config.model_kwargs)
    refused(
        config,
        tmp_path,
        r"fc.weight \[6, 24\] there, \[7, 24\] here.*--model-kwargs num_classes=N",
        model_kwargs=seven,
    )
    refused(config, tmp_path, r"fc.weight \[6, 24\] there, \[1000, 24\]", model_kwargs=CONFIG.model_kwargs)
    refused(  # nothing is fetched to know that
        config, tmp_path, r"fc.weight \[1000, 24\] there, \[6, 24\] here", weights=None, pretrained=True
    )
    refused(config, tmp_path, "not in embedding, which needs targets", task="embedding")


def test_methods_are_not_compared_without_classes(config, tmp_path):
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(PruneConfig)}
    with pytest.raises(ConfigError, match="images with classes, and those in .* have none"):
        compare(CompareConfig(**settings | {"out": tmp_path / "compare"}))
