"""Ablations: jobs that differ in one setting share a baseline, and go on where they were stopped."""

import csv

import pytest
from on_request import on_request

from benchmarks.pruning import ablations
from depthfuse.config import PruneConfig, to_dict

CONFIG = """
model: resnet18
model_kwargs: ["channels=(8,12,16,24)", "layers=(2,1,1,1)", "in_chans=1"]
out: {out}
data: {{max_train_images: 320, batch_size: 64, holdout: 0.2}}
baseline: {{epochs: 1, warmup_epochs: 0.0}}
supernet: {{epochs: 1, warmup_epochs: 0.0}}
search: {{strategy: greedy, calibration_images: 64, losing_merges: true}}
finetune: {{epochs: 2, warmup_epochs: 0.0, lambda_share: 0.5}}
latency: {{device: mi100}}
cpu: true
methods: [updp]
budgets: ["macs=0.99", "macs=0.95"]
"""


@on_request("a minute")
def test_jobs_differ_in_one_setting_and_are_not_repeated(tmp_path, monkeypatch):
    config, jobs = tmp_path / "small.yaml", tmp_path / "out" / "ablations"
    config.write_text(CONFIG.format(out=tmp_path / "out"))
    only = ["as configured", "no border remedy"]
    arguments = ["ablations", "--config", str(config), "--out", str(tmp_path), "--only", *only]
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "0", "--no-table"])
    ablations.main()
    assert not (tmp_path / "small_ablations.csv").exists()
    written = {path: path.stat().st_mtime_ns for path in jobs.glob("seed0/*/merged.safetensors")}
    assert len(written) == len(only)
    monkeypatch.setattr("sys.argv", [*arguments, "--seeds", "0", "1"])
    ablations.main()
    assert {path: path.stat().st_mtime_ns for path in written} == written
    rows = list(csv.DictReader((tmp_path / "small_ablations.csv").open()))
    assert [(row["ablation"], row["seed"]) for row in rows] == [(n, s) for n in only for s in "01"]
    for seed in "01":
        assert len({row["baseline_top1"] for row in rows if row["seed"] == seed}) == 1
    table = (tmp_path / "small_ablations.md").read_text()
    assert "| as configured |" in table and "| +0.00 ± 0.00 |" in table and "| no border remedy |" in table


def test_each_ablation_changes_its_setting_alone():
    before = to_dict(PruneConfig())
    for name, (_, changes) in ablations.ABLATIONS.items():
        after = to_dict(ablations.changed(PruneConfig(), changes))
        for setting, value in changes.items():
            stage, field = setting.split(".")
            assert after[stage].pop(field) == value != before[stage][field], name
            after[stage][field] = before[stage][field]
        assert after == before, name
    with pytest.raises(TypeError):
        ablations.changed(PruneConfig(), {"finetune.no_such": 1})
