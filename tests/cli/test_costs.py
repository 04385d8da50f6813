"""`depthfuse inspect` and `depthfuse latency`. Nothing is timed."""

import pytest
from fake_clock import Clock
from nets import SMALL

from depthfuse.cli import main
from depthfuse.costs.table import CostTable


def test_inspect(capsys):
    assert main(["inspect", "test_resnet"]) == 0
    out = capsys.readouterr().out
    assert "layer1.0" in out and "compact" in out
    assert main(["inspect", "efficientnet_b0"]) == 0
    assert "SE gate" in capsys.readouterr().out
    assert main(["inspect", "mixer_s32_224"]) == 0
    assert "linear" in capsys.readouterr().out
    assert main(["inspect", "densenet121"]) == 0
    assert "DenseLayer" in (out := capsys.readouterr().out) and "cat" in out


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


def test_latency(clock, tmp_path, capsys):
    name, kwargs, side = SMALL["resnet"]
    pairs = [f"{key}={value}".replace(" ", "") for key, value in kwargs.items()]
    command = ["latency", name, "--model-kwargs", *pairs, "--input-size", "3", str(side), str(side), "--out"]
    out = tmp_path / "latency.json"
    assert main([*command, str(out), "--check", "2"]) == 0
    text = capsys.readouterr().out
    assert "measured" in text and "layer1.0" in text and "relative error of the sums" in text
    assert CostTable.load(out).conditions["input_size"] == [3, side, side]
    assert main([*command, str(out), "--device", "mi300x", "--dtype", "fp16"]) == 0
    assert "PREDICTED" in capsys.readouterr().out
    assert CostTable.load(out).conditions["device"] == "MI300X"
    assert main([*command, str(out), "--device", "mi100", "--check", "2"]) == 1
    assert "--check measures here" in capsys.readouterr().err
    for flag in ("--batch", "--rounds"):
        assert main([*command, str(out), flag, "0"]) == 2
        assert f"{flag} is 0, expected 1 or more" in capsys.readouterr().err
