"""The whole job as two processes, on folders and streams, taking over, killed and refused: it ends, as one would."""

import dataclasses
import os
import shutil
import signal

import numpy as np
import prune_worker
import pytest
import torch
from on_request import on_request
from PIL import Image
from processes import made_once, pair, torchrun
from shards import CLASSES, shard_config, write_shards

from depthfuse import ModelSource, PruneConfig, Supernet, load
from depthfuse.checkpoint import load_json, load_tensors
from depthfuse.config import (
    FinetuneConfig,
    LatencyConfig,
    SearchConfig,
    SupernetConfig,
    TrainConfig,
    parse_model_kwargs,
    to_yaml,
)
from depthfuse.costs.table import CostTable
from depthfuse.data import DataConfig
from depthfuse.errors import CheckpointError
from depthfuse.runs.run import Run, prune
from depthfuse.spec import SubnetSpec
from depthfuse.training.evaluation import calibrate, top1

SIDE = 16
CONFIG = PruneConfig(
    model="resnet18",
    model_kwargs=("channels=(8,12,16,24)", "layers=(1,1,1,1)"),
    data=DataConfig(img_size=SIDE, batch_size=8, val_batch_size=8, holdout=0.5),
    baseline=TrainConfig(epochs=1, lr=2e-3, warmup_epochs=0.0),
    supernet=SupernetConfig(epochs=2, warmup_epochs=0.0),
    search=SearchConfig(
        blocks=2,
        population=3,
        parents=2,
        generations=1,
        calibration_images=16,
        losing_merges=True,
        finalists=2,
    ),
    finetune=FinetuneConfig(epochs=2, warmup_epochs=0.0),
    latency=LatencyConfig(rounds=1, foreign_table=True),
    cpu=True,
    checkpoint_seconds=0.0,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes, one a little brighter: 96 images for training and 53 for validation, which no batch size divides."""

    def make(root):
        rng = np.random.RandomState(0)
        for split, counts in (("train", (48, 48)), ("val", (27, 26))):
            for label, count in enumerate(counts):
                (root / split / str(label)).mkdir(parents=True)
                for number in range(count):
                    pixels = rng.randint(0, 236, (SIDE, SIDE, 3), dtype=np.uint8) + np.uint8(20 * label)
                    Image.fromarray(pixels).save(root / split / str(label) / f"{number}.png")

    return made_once(tmp_path_factory, "images_of_two", make)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Latencies for all runs here. They decide nothing, as a number of blocks is asked for, and are not measured."""
    kwargs = parse_model_kwargs(CONFIG.model_kwargs)
    supernet = Supernet(ModelSource.make(CONFIG.model, **kwargs).build())
    options = supernet.options()
    saved = {path: {name: 0.01 * i for i, name in enumerate(names)} for path, names in options.items()}
    costs = CostTable({"model": CONFIG.model, "device": "none"}, "ms", 1.0, saved)
    return made_once(tmp_path_factory, "table_of_two", lambda f: costs.save(f / "table.json")) / "table.json"


@pytest.fixture(scope="module")
def config(images, table):
    data = dataclasses.replace(CONFIG.data, data=str(images))
    return dataclasses.replace(CONFIG, data=data, latency=dataclasses.replace(CONFIG.latency, table=table))


def command(folder, config, *flags):
    """`prune` of this config into FOLDER/run; the processes leave their ids in FOLDER."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    return [
        prune_worker.__file__,
        folder,
        "--config",
        folder / "config.yaml",
        "--out",
        folder / "run",
        *flags,
    ]


def finished_by_two(folder, config, *flags):
    with torchrun(*command(folder, config, *flags)) as processes:
        assert processes.exit_codes() == [0], processes.said()
    out = folder / "run"
    assert all("divergence" in row for row in load_json(out / "finalists.json"))
    assert (out / "report.md").exists() and not list(out.glob("*.state")) and not list(out.glob(".*"))
    return out


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run of two processes that nobody disturbed."""
    return made_once(tmp_path_factory, "run_by_two", lambda folder: finished_by_two(folder, config)) / "run"


def row(out, net):
    return next(row for row in load_json(out / "results.json")["rows"] if row["net"] == net)


def check_scores(out, config):
    """What two processes have written is what one process finds: on all validation images, and on all held out."""
    run = Run(dataclasses.replace(config, out=out), until="search")
    baseline, merged = run.baseline(), load(out)
    assert row(out, "baseline")["top1"] == top1(baseline, run.data.val_loader())
    assert row(out, "merged")["top1"] == top1(merged, run.data.val_loader())
    assert [r["top1"] for r in load_json(out / "history_baseline.json") if "top1" in r] == [
        top1(baseline, run.data.holdout_loader())
    ]
    supernet = run.supernet()
    calibrate(supernet, run.data, config.search.calibration_images)
    full = [r["top1_full"] for r in load_json(out / "history_supernet.json") if "top1_full" in r]
    assert full[-1] == top1(supernet, run.data.holdout_loader())


@on_request("half a minute")
def test_a_folder_of_images(finished, config):
    assert len(SubnetSpec.load(finished / "subnet.json").choices) == 2
    check_scores(finished, config)


@on_request("half a minute")
def test_a_stream(config, tmp_path):
    pytest.importorskip("webdataset", reason="WebDataset is an optional dependency (extra: data)")
    shards = write_shards(tmp_path)
    data = shard_config(shards, val_batch_size=5, holdout_split="val-{0..1}.tar|24")
    kwargs = (*CONFIG.model_kwargs, f"num_classes={CLASSES}")
    config = dataclasses.replace(config, data=data, model_kwargs=kwargs)
    check_scores(finished_by_two(tmp_path / "two", config), config)


@on_request("half a minute")
def test_taking_over_what_another_run_has_worked_out(finished, config, tmp_path):
    flags = ["--start-from", finished, "--search.strategy", "greedy", "--search.blocks", "1"]
    out = finished_by_two(tmp_path / "two", config, *flags)
    for name in ("baseline", "supernet"):
        assert (out / f"{name}.safetensors").read_bytes() == (finished / f"{name}.safetensors").read_bytes()
    assert len(SubnetSpec.load(out / "subnet.json").choices) == 1


def test_one_process_killed(finished, config, tmp_path):
    """All end; another number of processes is refused; the same command goes on and ends with the same bits."""
    folder = tmp_path / "two"
    out = folder / "run"
    with torchrun(*command(folder, config)) as processes:
        processes.wait_until((out / "supernet.state").exists)
        os.kill(int((folder / "1.pid").read_text()), signal.SIGKILL)
        assert processes.exit_codes() != [0], processes.said()
    assert not (out / "results.json").exists()
    alone = tmp_path / "alone"
    shutil.copytree(out, alone)
    with pytest.raises(CheckpointError, match=r"supernet.state .*on 2 process\(es\), and this run has 1"):
        prune(dataclasses.replace(config, out=alone))
    finished_by_two(folder, config)
    assert (out / "subnet.json").read_text() == (finished / "subnet.json").read_text()
    for name in ("baseline", "supernet", "finetune", "merged"):
        got, wanted = (load_tensors(run / f"{name}.safetensors")[0] for run in (out, finished))
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start-from", "FINISHED", "--seed", "3"], "seed differ there"),
        (
            ["--weights", "FINISHED/baseline.safetensors", "--latency.no-foreign-table"],
            "other conditions",
        ),
    ],
    ids=["when the folder is taken", "when latencies are made"],
)
def test_what_the_main_process_finds_wrong_ends_all(flags, message, finished, config, tmp_path):
    flags = [flag.replace("FINISHED", str(finished)) for flag in flags]
    with pair(*command(tmp_path / "two", config, *flags)) as processes:
        assert processes.exit_codes() == [1, 1], processes.said()
        errors = [text.strip().splitlines()[-1] for text in processes.said()]
    assert errors[0] == errors[1]
    assert errors[0].startswith("depthfuse: ") and message in errors[0]
