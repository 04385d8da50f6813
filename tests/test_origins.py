"""Names of models: timm's, torchvision's, and factories of a user's own, which no file may call."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_code import BLOCK
from torch import nn

from depthfuse import ModelSource, SubnetSpec, Supernet, allow_origin, origins
from depthfuse.errors import SpecError
from depthfuse.merging.model_inputs import fixed_image_size, input_size
from depthfuse.origins import allow_named, check_model_name, is_own

MODULE = (
    BLOCK
    + """
import itertools
import torch
from torch import nn

calls = []
counter = itertools.count(4)
not_callable = 3


def build(num_classes=3, width=8):
    calls.append((num_classes, width))
    return nn.Sequential(
        nn.Conv2d(3, width, 3), Block(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    )


def fails(**_):
    raise ZeroDivisionError("on purpose")


def no_model(**_):
    return {"a": 1}


def unsteady(**_):
    return nn.Linear(next(counter), 2)
"""
)


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of the user's own in the folder where the command runs."""
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origins, "_allowed", set())
    yield tmp_path
    sys.modules.pop("my_nets", None)


def test_names():
    assert check_model_name("timm:resnet18") == check_model_name("resnet18") == "resnet18"
    assert check_model_name("torchvision:resnet50") == "torchvision:resnet50"
    assert check_model_name("a.b_c:build") == "a.b_c:build"
    assert not any(
        map(
            is_own,
            ("resnet18", "torchvision:x", "timm.models:create", "torch.hub:load", "a:b:c", "a/b:c"),
        )
    )
    for name in (
        "hf-hub:timm/resnet18",
        "local-dir:/tmp",
        "../x",
        "a:b c",
        "os:",
        ":f",
        "torch.hub:load",
        3,
        None,
        "",
    ):
        with pytest.raises(SpecError, match="names no model"):
            check_model_name(name)


def test_torchvision():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    source = ModelSource.make("torchvision:resnet18", num_classes=7)
    model = source.build()
    assert type(model).__module__ == "torchvision.models.resnet" and model.fc.out_features == 7
    spec = Supernet(model).spec()
    assert SubnetSpec.from_json(spec.to_json()) == spec and spec.source == source
    with pytest.raises(SpecError, match="similar names: .*resnet18"):
        ModelSource.make("torchvision:resnet17").build()
    with pytest.raises(SpecError, match="torchvision refused the arguments"):
        ModelSource.make("torchvision:resnet18", img_size=3).build()
    with pytest.raises(SpecError, match="--weights"):
        source.build(pretrained=True)


def test_no_file_calls_a_factory(nets):
    source = ModelSource.make("my_nets:build", width=16)
    text = SubnetSpec.from_mapping(source, {"1": "dense"}).to_json()
    for given in (source, SubnetSpec.from_json(text).source):
        with pytest.raises(SpecError, match=r"allow_origin\('my_nets:build'\)"):
            given.build()
    assert "my_nets" not in sys.modules
    allow_named(["prune", "--model=my_nets:build", "--out", "x"])
    spec = SubnetSpec.from_json(text)
    assert spec.source.build()[0].out_channels == 16
    assert str(nets) not in sys.path
    supernet = Supernet(spec.source.build())
    supernet.set_choices(spec)
    assert supernet.spec() == spec


def test_a_folder_of_hugging_face(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(origins, "_allowed", set())
    options = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **options)
    saved = transformers.ViTForImageClassification(config).eval()
    saved.save_pretrained(tmp_path)
    name = f"hf:{tmp_path}"
    source = ModelSource.make(name, num_classes=3)
    with pytest.raises(SpecError, match="allow_origin"):
        source.build()
    allow_origin(name)
    model = source.build()
    assert input_size(model) == (3, 32, 32) and fixed_image_size(model) == (32, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert len(Supernet(model).blocks) == 2
    x = torch.randn(2, 3, 32, 32)
    loaded = ModelSource.make(name).build(pretrained=True).eval()
    assert torch.equal(loaded(x), saved(x).logits)
    assert ModelSource.make(name, num_classes=3).build(pretrained=True)(x).shape == (2, 3)
    allow_origin("hf:nowhere")
    with pytest.raises(SpecError, match="there is no config.json in .*nowhere"):
        ModelSource.make("hf:nowhere").build()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_nets:fails", "my_nets refused the arguments .* ZeroDivisionError on purpose"),
        ("my_nets:no_model", "gave a dict, expected a torch.nn.Module"),
        ("my_nets:unsteady", "other shapes when it was called twice"),
        ("my_nets:not_callable", "is a int, expected a function"),
        ("my_nets:missing", "cannot be imported: AttributeError"),
        ("no_such_module:build", "cannot be imported: ModuleNotFoundError"),
        ("my_nets:build", "pretrained"),
    ],
)
def test_factories_that_cannot_be_used(nets, name, says):
    allow_origin(name)
    pretrained = says == "pretrained"
    with pytest.raises(SpecError, match="load its weights" if pretrained else says):
        ModelSource.make(name).build(pretrained=pretrained)


def test_arguments_of_a_factory_are_plain(nets):
    allow_origin("my_nets:build")
    assert ModelSource.make("my_nets:build", width=4, num_classes=2).build()[4].out_features == 2
    for arguments in ({"width": 2**30}, {"width": object()}, {"a b": 1}, {"x": "$(rm)"}):
        with pytest.raises(SpecError):
            ModelSource.of_document("my_nets:build", arguments)


def test_only_factories_are_allowed():
    for name in ("resnet18", "torchvision:resnet18", "os", "x:y:z", "torch.hub:load"):
        with pytest.raises(SpecError, match="needs no leave"):
            allow_origin(name)


def test_inspect_takes_a_factory_that_stands_on_the_command_line(nets):
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "depthfuse.cli", "inspect", "my_nets:build", "--model-kwargs", "width=4"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(root), "PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    assert "Block" in done.stdout and "dense" in done.stdout


def test_a_model_that_is_passed_needs_no_name():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            )

        def forward(self, x):
            return self.net(x).mean((2, 3))

    supernet = Supernet(Mine())
    assert supernet.source.name == "Mine" and list(supernet.blocks) == ["net"]
    assert supernet(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
