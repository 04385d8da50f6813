"""A run that starts from fitted blocks, with and without training after it."""

import dataclasses

import pytest
import torch
from killed_runs import assert_same_weights, kill_when_there, merge_command, run_again
from on_request import on_request
from small_run import CONFIG, undisturbed

from depthfuse import load
from depthfuse.checkpoint import load_json, load_tensors
from depthfuse.errors import ConfigError, FitError
from depthfuse.fitting.fitted import Fitted
from depthfuse.runs.run import Run, prune
from depthfuse.training.evaluation import calibrate, evaluate

FIT = dataclasses.replace(CONFIG, start="fit", train=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return undisturbed(FIT, tmp_path_factory.mktemp("fit") / "run")


def test_nothing_is_trained_beside_the_baseline(finished):
    assert {path.name for path in finished.glob("history_*.json")} == {"history_baseline.json"}
    rows = {row["net"]: row for row in load_json(finished / "results.json")["rows"]}
    assert rows["pruned"]["top1"] == rows["merged"]["top1"]
    assert "merged" in (finished / "report.md").read_text()
    run = Run(dataclasses.replace(FIT, out=finished))
    supernet = run.supernet()
    assert all(isinstance(c, Fitted) for block in supernet.blocks.values() for c in block.candidates.values())
    baseline = run.baseline()
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(supernet.eval()(x), baseline.eval()(x))


def test_the_merged_model_is_what_was_scored(finished):
    run = Run(dataclasses.replace(FIT, out=finished))
    rows = {row["net"]: row for row in load_json(finished / "results.json")["rows"]}
    assert evaluate(load(finished), run.data.val_loader()).top1 == rows["merged"]["top1"]


def test_fitted_blocks_are_nearer_to_the_original_than_merged_ones(finished):
    """The same blocks, merged from the baseline's weights without training: activations simply removed."""
    run = Run(dataclasses.replace(FIT, out=finished))
    bare = run.switched(run.baseline()).eval()
    bare.set_choices(run.search())
    calibrate(bare, run.data, 2048)
    images, _ = next(iter(run.data.val_loader()))
    with torch.no_grad():
        wanted, *found = (net.eval()(images) for net in (run.baseline(), run.finetune(), bare))
    fitted, merged = ((logits - wanted).square().mean() for logits in found)
    assert fitted < 0.7 * merged


@on_request("half a minute")
@pytest.mark.parametrize("stage", ["supernet", "subnet.json"])
def test_killed_on_the_way_it_ends_with_the_same_bits(finished, tmp_path, stage):
    command, out = merge_command(FIT, finished, tmp_path)
    kill_when_there(command, out / (stage if "." in stage else f"{stage}.safetensors"))
    run_again(command)
    assert_same_weights(out, finished, ("baseline", "supernet", "finetune", "merged"))


def test_training_goes_on_from_the_fit(finished, tmp_path):
    out = tmp_path / "run"
    prune(dataclasses.replace(FIT, out=out, train=True, start_from=finished), until="merge")
    got, wanted = (load_tensors(folder / "supernet.safetensors")[0] for folder in (out, finished))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    history = load_json(out / "history_finetune.json")
    assert history[0]["lambda"] > 0.5 and "top1" in history[-1]  # which is there at lambda 0 only
    trained, fitted = (load_tensors(folder / "merged.safetensors")[0] for folder in (out, finished))
    assert any(not torch.equal(trained[name], fitted[name]) for name in fitted)


def test_another_start_is_another_run(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot start from .*: start differ"):
        Run(dataclasses.replace(FIT, out=tmp_path / "run", start="supernet", start_from=finished))


def test_too_few_images_are_named(finished, tmp_path):
    search = dataclasses.replace(CONFIG.search, calibration_images=20)
    with pytest.raises(FitError, match=r"64 images at least, .* search.calibration_images is 20"):
        prune(dataclasses.replace(FIT, out=tmp_path / "run", search=search), until="supernet")
