"""`depthfuse bench`: a timm model, or the merged model of a run."""

import pytest
from on_request import on_request

from depthfuse.cli import main

QUICK = ["--contenders", "eager", "--rounds", "2", "--round-ms", "1"]


@on_request("a minute")
def test_a_timm_model(tmp_path, capsys):
    arguments = ["bench", "test_resnet", "--model-kwargs", "num_classes=3", "--batch", "1", "2", *QUICK]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "layer1.0.conv1" in out and "roofline_ms" in out and "time / ours" in out
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench_cpu_fp32.csv",
        "bench_cpu_fp32.html",
        "bench_cpu_fp32.png",
        "operations_cpu_fp32.csv",
    }


def test_the_merged_model_of_a_run(finished, tmp_path, capsys):
    for name in ("subnet.json", "merged.safetensors", "results.json"):
        (tmp_path / name).write_bytes((finished.dir / name).read_bytes())
    assert main(["bench", str(tmp_path), "--batch", "1", *QUICK]) == 0
    assert "depthfuse" in capsys.readouterr().out
    assert {f"bench_cpu_fp32.{kind}" for kind in ("csv", "html", "png")} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["test_resnet", "--contenders", "magic"], 1, "unknown contender 'magic'; known: depthfuse, eager"),
        (["no_such_model"], 1, "timm has no model 'no_such_model'"),
        (["runs/nothing"], 1, "there is no folder or file runs/nothing"),
        (["test_resnet", "--device", "cuda:99"], 1, "there is no device 'cuda:99' here; there are: cpu"),
        (["test_resnet", "--batch", "2", "0"], 2, "--batch is 0, expected 1 or more"),
        (["test_resnet", "--rounds", "0"], 2, "--rounds is 0, expected 1 or more"),
    ],
)
def test_bad_input_is_named(args, code, message, capsys):
    assert main(["bench", *args]) == code
    assert message in capsys.readouterr().err


def test_a_run_takes_no_arguments_of_its_model(finished, capsys):
    assert main(["bench", str(finished.dir), "--model-kwargs", "num_classes=3"]) == 2
    assert "--model-kwargs cannot be given for the model of a run" in capsys.readouterr().err
