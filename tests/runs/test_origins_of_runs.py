"""The whole job on nets that timm does not know: a function of the user's own, and a folder of Hugging Face's."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from on_request import on_request
from small_run import CONFIG

from depthfuse import load, origins
from depthfuse.checkpoint import load_json
from depthfuse.config import to_yaml
from depthfuse.errors import SpecError
from depthfuse.spec import SubnetSpec

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def build(num_classes=10, width=8):
    return Net(num_classes, width)
"""


def command(config, folder, *flags):
    """`depthfuse prune` in that folder."""
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "depthfuse.cli", "prune", "--config", str(file), *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.setattr(origins, "_allowed", set())
    yield tmp_path
    sys.modules.pop("my_nets", None)


@on_request("half a minute")
def test_a_factory_killed_once_and_resumed(own, monkeypatch):
    out = own / "run"
    config = dataclasses.replace(CONFIG, model="my_nets:build", model_kwargs=("width=12",), out=out)
    refused = command(config, own)  # a file alone runs nobody's code
    assert "allow_origin" in refused.communicate(timeout=120)[0] and refused.returncode == 1
    assert not out.exists()
    started = command(config, own, "--model", "my_nets:build")
    deadline = time.monotonic() + 240
    while not (out / "baseline.safetensors").exists():
        assert started.poll() is None, started.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    resumed = command(config, own, "--model", "my_nets:build")
    printed = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, printed
    spec = SubnetSpec.load(out / "subnet.json")
    assert spec.source.name == "my_nets:build" and len(spec.choices) == 2
    rows = {row["net"] for row in load_json(out / "results.json")["rows"]}
    assert rows == {"baseline", "baseline accelerated", "pruned", "merged", "merged accelerated"}
    assert "my_nets:build" in (out / "report.md").read_text()
    with pytest.raises(SpecError, match="allow_origin"):
        load(out)
    monkeypatch.chdir(own)
    origins.allow_origin("my_nets:build")
    merged = load(out)
    # which candidate won depends on what this machine measured
    assert sum(type(m).__name__ == "Block" for m in merged.modules()) == 1
    assert merged(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_folder_of_hugging_face(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(origins, "_allowed", set())
    options = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
    transformers.ViTConfig(
        image_size=28, patch_size=7, num_channels=1, num_labels=10, **options
    ).save_pretrained(tmp_path / "vit")
    config = dataclasses.replace(CONFIG, model="hf:vit", model_kwargs=(), out=tmp_path / "run")
    done = command(config, tmp_path, "--model", "hf:vit")
    printed = done.communicate(timeout=300)[0]
    assert done.returncode == 0, printed
    monkeypatch.chdir(tmp_path)
    origins.allow_origin("hf:vit")
    merged = load(tmp_path / "run")
    assert merged(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert len(SubnetSpec.load(tmp_path / "run" / "subnet.json").choices) == 2
