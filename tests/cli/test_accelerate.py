"""`depthfuse accelerate`: from a timm model, a run, or a file of its own, to a file that Python loads."""

import pytest
import torch
from nets import randomise_norms
from safetensors.torch import save_file

import depthfuse.cli.accelerate
from depthfuse import ModelSource, load, load_accelerated
from depthfuse.acceleration import accelerate
from depthfuse.acceleration.running.other_engines import OTHER_ENGINES, OtherEngine
from depthfuse.cli import main
from depthfuse.config import DTYPES

KWARGS = ["--model-kwargs", "num_classes=3", "in_chans=1"]
SOURCE = ModelSource.make("test_resnet", num_classes=3, in_chans=1)


def image(batch=2, size=(1, 64, 64)):
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(model, the file of its state dict)."""
    torch.manual_seed(3)
    model = randomise_norms(SOURCE.build()).eval()
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(model.state_dict(), file)
    return model, file


@pytest.fixture(scope="module")
def fast(tmp_path_factory, weights):
    """A file that the command wrote."""
    file = tmp_path_factory.mktemp("fast") / "fast.safetensors"
    arguments = ["accelerate", "test_resnet", *KWARGS, "--weights", str(weights[1]), "--tune", "off"]
    assert main([*arguments, "--out", str(file)]) == 0
    return file


@pytest.fixture
def asked(monkeypatch):
    """What `depthfuse.accelerate` is asked for: example input and keyword arguments. It measures nothing."""
    asked = []

    def spy(model, x, **options):
        asked.append((x, options))
        return accelerate(model, x, **{**options, "tune": "off"})

    monkeypatch.setattr(depthfuse.cli.accelerate, "accelerate_model", spy)
    return asked


def agree(file, model, x):
    with torch.no_grad():
        torch.testing.assert_close(load_accelerated(file, tune="off")(x), model(x), rtol=1e-4, atol=1e-4)


def test_weights_of_your_own(fast, weights, tmp_path, capsys):
    agree(fast, weights[0], image())
    file = tmp_path / "new" / "fast.safetensors"
    arguments = [
        "accelerate",
        "test_resnet",
        *KWARGS,
        "--weights",
        str(weights[1]),
        "--tune",
        "off",
        "--quiet",
    ]
    assert main([*arguments, "--out", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "layer1.0.conv1" in shown.out and "largest relative error" in shown.out
    *_, written, python = shown.out.splitlines()
    assert written.startswith(f"written: {file} (") and "earlier" not in written
    assert python == f'in Python: depthfuse.load_accelerated("{file}")'
    loaded = eval(python.removeprefix("in Python: "), {"depthfuse": depthfuse})
    with torch.no_grad():
        assert torch.equal(loaded(image()), load_accelerated(fast, tune="off")(image()))


def test_random_weights_are_said_loudly(tmp_path, asked, capsys):
    file = tmp_path / "fast.safetensors"
    assert main(["accelerate", "test_resnet", *KWARGS, "--out", str(file), "--quiet"]) == 0
    assert "test_resnet has RANDOM WEIGHTS" in capsys.readouterr().err
    assert load_accelerated(file, tune="off")(image()).shape == (2, 3)


def test_pretrained_weights(tmp_path, asked, monkeypatch, weights, capsys):
    built = []

    def build(source, pretrained=False):
        built.append((source, pretrained))
        return weights[0]

    with monkeypatch.context() as patch:
        patch.setattr(ModelSource, "build", build)
        assert main(["accelerate", "test_resnet", *KWARGS, "--pretrained", "--out", str(tmp_path / "a")]) == 0
    assert built[0] == (SOURCE, True)
    assert "RANDOM" not in capsys.readouterr().err
    agree(tmp_path / "a", weights[0], image())
    assert main(["accelerate", "resnetv2_50d", "--pretrained", "--out", str(tmp_path / "b")]) == 1
    assert "pretrained weights cannot be loaded with" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_merged_model_of_a_run(finished, tmp_path, capsys):
    file = tmp_path / "fast.safetensors"
    assert main(["accelerate", str(finished.dir), "--tune", "off", "--out", str(file)]) == 0
    assert "RANDOM" not in capsys.readouterr().err
    agree(file, load(finished.dir), image(size=(1, 28, 28)))


def test_a_run_that_ends_with_the_merge(finished, tmp_path):
    for name in ("subnet.json", "merged.safetensors", "latency.json"):
        (tmp_path / name).write_bytes((finished.dir / name).read_bytes())
    file = tmp_path / "fast.safetensors"
    assert main(["accelerate", str(tmp_path), "--tune", "off", "--out", str(file)]) == 0
    agree(file, load(tmp_path), image(size=(1, 28, 28)))


def test_a_file_is_accelerated_anew(fast, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(depthfuse.cli.accelerate, "accelerate_model", None)  # the model is not needed
    file = tmp_path / "here.safetensors"
    for earlier in (False, True):
        assert main(["accelerate", str(fast), "--tune", "off", "--out", str(file)]) == 0
        assert ("in place of an earlier file" in capsys.readouterr().out) is earlier
        agree(file, weights[0], image())
    assert main(["accelerate", str(file), "--tune", "off", "--out", str(file)]) == 0  # its own successor
    agree(file, weights[0], image())
    seen = []
    monkeypatch.setattr(
        depthfuse.cli.accelerate,
        "load_accelerated",
        lambda *given: seen.append(given) or load_accelerated(file, tune="off"),
    )
    assert main(["accelerate", str(file), "--tune", "heuristic", "--device", "cpu", "--out", str(file)]) == 0
    assert seen == [(str(file), torch.device("cpu"), "heuristic", "auto")]


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "auto", None])
def test_dtype(name, asked, weights, tmp_path):
    file = tmp_path / "fast.safetensors"
    flags = [] if name is None else ["--dtype", name]
    arguments = [
        "accelerate",
        "test_resnet",
        *KWARGS,
        "--weights",
        str(weights[1]),
        "--verify",
        "off",
        *flags,
    ]
    assert main([*arguments, "--out", str(file)]) == 0
    ((x, options),) = asked
    assert x.dtype == torch.float32
    assert options["dtype"] == ("auto" if name == "auto" else DTYPES[name or "fp32"])
    if name != "auto":
        assert load_accelerated(file, tune="off").dtype == DTYPES[name or "fp32"]


@pytest.mark.parametrize(
    ("flags", "batch", "wanted"),
    [
        ([], 1, {"backend": "auto", "tune": "measure", "verify": True, "engines": "auto"}),
        (["--engines", "own"], 1, {"engines": "own"}),
        (["--engines", "torch.compile"], 1, {"engines": ("torch.compile",)}),
        (["--batch", "3", "--verify", "blocks"], 3, {"verify": "blocks"}),
        (["--tune", "heuristic", "--verify", "off"], 1, {"tune": "heuristic", "verify": False}),
        (["--tune", "off", "--backend", "reference"], 1, {"tune": "off", "backend": "reference"}),
        (["--device", "cpu", "--verify", "outputs"], 1, {"verify": True}),
    ],
)
def test_flags_reach_the_acceleration(flags, batch, wanted, asked, weights, tmp_path, capsys):
    file = tmp_path / "fast.safetensors"
    arguments = ["accelerate", "test_resnet", *KWARGS, "--weights", str(weights[1]), *flags]
    assert main([*arguments, "--out", str(file)]) == 0
    ((x, options),) = asked
    assert x.shape[:2] == (batch, 1) and x.device.type == "cpu" and options.items() >= wanted.items()
    assert ("not verified" in capsys.readouterr().out) == (wanted.get("verify") is False)


def test_an_engine_that_fails_is_named_to_who_asked_for_it(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHFUSE_CACHE_DIR", str(tmp_path / "cache"))

    def cannot(exported, threads):
        raise RuntimeError("no such operator")

    monkeypatch.setitem(OTHER_ENGINES, "openvino", OtherEngine(cannot))
    arguments = ["accelerate", "test_resnet", *KWARGS, "--weights", str(weights[1]), "--quiet"]
    assert main([*arguments, "--engines", "openvino", "--out", str(tmp_path / "fast")]) == 0
    shown = capsys.readouterr()
    assert "WARNING openvino does not run this model: no such operator. What runs: " in shown.err
    assert shown.err.strip().split("What runs: ")[1] in shown.out


def test_a_word_for_many_engines_stands_alone(weights, tmp_path, capsys):
    arguments = [
        "accelerate",
        "test_resnet",
        *KWARGS,
        "--weights",
        str(weights[1]),
        "--engines",
        "own",
        "openvino",
    ]
    assert main([*arguments, "--out", str(tmp_path / "fast.safetensors")]) == 2
    assert "--engines own stands alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--pretrained"],
        ["--weights", "w"],
        ["--model-kwargs", "a=1"],
        ["--batch", "1"],
        ["--dtype", "fp32"],
        ["--backend", "auto"],
        ["--verify", "off"],
    ],
    ids=" ".join,
)
def test_a_file_refuses_what_it_would_ignore(flags, fast, finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["accelerate", str(fast), *flags, "--out", str(out)]) == 2
    assert f"{flags[0]} cannot be given for {fast}" in capsys.readouterr().err
    if flags[0] in ("--pretrained", "--weights", "--model-kwargs"):
        assert main(["accelerate", str(finished.dir), *flags, "--out", str(out)]) == 2
        assert f"{flags[0]} cannot be given for {finished.dir}" in capsys.readouterr().err
    assert not out.exists()


def test_what_cannot_be_accelerated_is_named(weights, tmp_path, capsys):
    def fails(code, message, *args, out="out"):
        assert main(["accelerate", *map(str, args), "--out", str(tmp_path / out)]) == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    fails(1, "timm has no model 'resnet1888'", "resnet1888")
    fails(1, "there is no folder or file runs/nothing", "runs/nothing")
    fails(1, "none.safetensors does not exist", tmp_path / "none.safetensors")
    fails(1, "depthfuse accelerate MODEL --weights FILE", weights[1])
    fails(1, "subnet.json does not exist", tmp_path)
    fails(1, "weights of another model", "test_resnet", "--weights", weights[1])
    fails(1, "there is no device 'cuda:99' here; there are: cpu", "test_resnet", "--device", "cuda:99")
    fails(1, "there is no device 'tpu' here; there are: cpu", "test_resnet", "--device", "tpu")
    fails(2, "two sources of weights", "test_resnet", "--pretrained", "--weights", "w")
    fails(2, "--batch is 0, expected 1 or more", "test_resnet", "--batch", "0")
    fails(2, "is a folder", "test_resnet", out=".")
    assert main(["accelerate", "test_resnet"]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_failure_leaves_the_earlier_file(weights, fast, tmp_path, monkeypatch):
    file = tmp_path / "fast.safetensors"
    file.write_bytes(fast.read_bytes())

    def fails(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    assert main(["accelerate", str(fast), "--tune", "off", "--out", str(file)]) == 1
    assert file.read_bytes() == fast.read_bytes() and list(tmp_path.iterdir()) == [file]
