"""`depthfuse export`: from a model's name, a run, or an accelerated file, to a file for another runtime."""

import json
import re

import pytest
import torch
from nets import randomise_norms
from PIL import Image
from safetensors.torch import save_file

from depthfuse import ModelSource, SubnetSpec, accelerate, load
from depthfuse.cli import main
from depthfuse.data.embedded import CLASS_NAMES
from depthfuse.exporting import RUNTIMES
from depthfuse.exporting.quantising import PACKAGES
from depthfuse.exporting.runtimes import absent
from depthfuse.measuring.accuracy import relative_error
from depthfuse.runs.feeding import load_feeding, save_feeding

KWARGS = ["--model-kwargs", "num_classes=3", "in_chans=1"]


def facts_of(path):
    files = {"depthfuse": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files["depthfuse"])


def agree(path, model, x):
    with torch.no_grad():
        assert relative_error(*RUNTIMES["torch"].run(path)(x), model(x)) < 1e-5


class Fed:
    """What a run knows of its data."""

    class_names, in_chans, img_size, mean, std = list(CLASS_NAMES), 1, 28, (0.25,), (0.5,)


@pytest.fixture
def fed(finished):
    """A run that keeps what its net is fed, as those of this version do."""
    save_feeding(finished.dir, Fed)
    yield finished.dir
    (finished.dir / "feeding.json").unlink()


def test_a_run(fed, tmp_path, capsys):
    path = tmp_path / "new" / "net.pt2"
    assert main(["export", str(fed), "--to", "torch", "--out", str(path), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.startswith(f"written: {path} (")
    assert "float32[batch, 1, 28, 28]" in shown.out
    facts = facts_of(path)
    assert facts["spec"] == json.loads(SubnetSpec.load(fed / "subnet.json").to_json())
    assert facts["classes"] == list(CLASS_NAMES) and (facts["mean"], facts["std"]) == ([0.25], [0.5])
    agree(path, load(fed), torch.randn(3, 1, 28, 28))


def test_an_early_run_did_not_keep_what_it_is_fed(finished, tmp_path):
    assert load_feeding(finished.dir) is None
    path = tmp_path / "net.pt2"
    assert main(["export", str(finished.dir), "--to", "torch", "--no-check", "--out", str(path)]) == 0
    facts = facts_of(path)
    assert (facts["classes"], facts["mean"], facts["input_size"]) == (None, None, [1, 28, 28])


def test_a_model_by_its_name_and_what_was_accelerated(tmp_path, capsys):
    torch.manual_seed(3)
    model = randomise_norms(ModelSource.make("test_resnet", num_classes=3, in_chans=1).build()).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    weights = ["--weights", str(tmp_path / "weights.safetensors")]
    flags = ["--dynamic", "none", "--batch", "2", "--classes", "a", "b", "c", "--mean", "0.5", "--std", "0.2"]
    path, x = tmp_path / "net.pt2", torch.randn(2, 1, 160, 160)
    assert (
        main(["export", "test_resnet", *KWARGS, *weights, *flags, "--to", "torch", "--out", str(path)]) == 0
    )
    facts = facts_of(path)
    assert facts["inputs"][0]["shape"] == [2, 1, 160, 160] and facts["classes"] == ["a", "b", "c"]
    assert (facts["mean"], facts["std"]) == ([0.5], [0.2])
    agree(path, model, x)
    accelerate(model, x, tune="off").save(tmp_path / "fast.safetensors")
    assert main(["export", str(tmp_path / "fast.safetensors"), "--to", "torch", "--out", str(path)]) == 0
    assert facts_of(path)["inputs"][0]["shape"] == ["batch", 1, 160, 160]
    agree(path, model, torch.randn(5, 1, 160, 160))
    assert "RANDOM" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "does not end in .onnx, which ONNX Runtime expects", ["test_resnet", "--to", "onnx"]),
        (2, "--device is for aoti", ["test_resnet", "--to", "torch", "--device", "cpu"]),
        (2, "--batch is 0, expected 1 or more", ["test_resnet", "--to", "torch", "--batch", "0"]),
        (2, "two sources of weights", ["test_resnet", "--to", "torch", "--pretrained", "--weights", "w"]),
        (
            2,
            "--batch cannot be given for fast.safetensors",
            ["fast.safetensors", "--to", "torch", "--batch", "2"],
        ),
        (
            2,
            "8 bits are written for 'onnx' and 'openvino', not for 'torch'",
            ["test_resnet", "--to", "torch", "--precision", "int8"],
        ),
        (2, "are settings of precision='int8'", ["test_resnet", "--to", "torch", "--points", "1"]),
        (1, "timm has no model 'resnet1888'", ["resnet1888", "--to", "torch"]),
        (1, "none.safetensors does not exist", ["none.safetensors", "--to", "torch"]),
    ],
)
def test_what_cannot_be_exported_is_named(code, message, arguments, tmp_path, capsys):
    out = tmp_path / "net.pt2"
    assert main(["export", *arguments, "--out", str(out)]) == code
    assert message in capsys.readouterr().err and not out.exists()


def test_a_run_in_8_bits(fed, tmp_path, capsys):
    """By its own data, and scored by its own task; or by any folder of images."""
    missing = absent(*PACKAGES)
    if missing:
        pytest.skip(f"{' and '.join(missing)} is not installed")
    path = tmp_path / "net.onnx"
    flags = ["--to", "onnx", "--precision", "int8", "--points", "30", "--calibration-images", "40"]
    assert main(["export", str(fed), *flags, "--out", str(path), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "8 bits: top-1 " in shown.out and "(30 points allowed)" in shown.out
    assert "where one layer alone is in 8 bits, the worst of " in shown.out
    assert (
        len(re.findall(r"^  (?:[\w.]*conv\w*|[\w.]+downsample\.0|fc): \d\.\de-\d\d$", shown.out, re.M)) == 8
    )
    model, x = load(fed), torch.randn(8, 1, 28, 28)
    with torch.no_grad():
        assert 1e-4 < relative_error(*RUNTIMES["onnx"].run(path)(x), model(x)) < 0.5
    images = ["--calibration", str(stripes(tmp_path / "images"))]
    code = main(["export", str(fed), *flags, *images, "--out", str(path), "--quiet"])
    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    assert "8 bits: agreement with the model 100.00 -> " in shown.out


def stripes(folder):
    """80 images without classes."""
    folder.mkdir()
    for number in range(80):
        pixels = (torch.arange(28 * 28) % (number % 7 + 2) * 30).to(torch.uint8).view(28, 28)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder
