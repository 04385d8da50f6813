"""`depthfuse inspect` and `depthfuse latency`. Nothing is timed."""

import pytest
from nets import SMALL

from depthfuse.cli import main
from depthfuse.costs import latency
from depthfuse.costs.table import CostTable
from depthfuse.measuring.counting import count_parameters
from depthfuse.measuring.timing import Timing


def test_inspect(capsys):
    assert main(["inspect", "test_resnet"]) == 0
    out = capsys.readouterr().out
    assert "layer1.0" in out and "compact" in out
    assert main(["inspect", "efficientnet_b0"]) == 0
    assert "SE gate" in capsys.readouterr().out
    assert main(["inspect", "mixer_s32_224"]) == 0
    assert "unknown block type" in capsys.readouterr().out


@pytest.fixture
def parameters_as_ms(monkeypatch):
    """A model takes as many milliseconds as it has parameters."""

    def accelerate(model, x, **_):
        latency_ms = float(count_parameters(model))
        return lambda given: latency_ms

    def time_interleaved(calls, rounds):
        return {name: Timing((call(),) * rounds) for name, call in calls.items()}

    monkeypatch.setattr(latency, "accelerate", accelerate)
    monkeypatch.setattr(latency, "time_interleaved", time_interleaved)


def test_latency(parameters_as_ms, tmp_path, capsys):
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
