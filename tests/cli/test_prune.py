"""`depthfuse prune`, its stages and the demo: flags over the entries of a file, what is printed, missed budgets."""

from dataclasses import replace
from pathlib import Path

import pytest

from depthfuse.checkpoint import save_json
from depthfuse.cli import main
from depthfuse.config import PruneConfig, from_dict
from depthfuse.effort import EFFORTS
from depthfuse.runs import demo, run
from depthfuse.runs.report import budget_missed
from depthfuse.runs.run import STAGES

BUDGET = {"name": "budget_ms", "unit": "ms", "wanted": 2.0, "reached": 2.5, "met": False}


@pytest.fixture
def asked(monkeypatch):
    """The settings and the stage that runs are asked for; none is done."""
    asked = []

    def prune(settings, until="compare"):
        asked.append((settings, until))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prune", prune)
    return asked


def test_a_finished_run_is_printed(finished, capsys):
    assert main(["prune", "--config", str(finished.config), "--out", str(finished.dir)]) == 0
    text = capsys.readouterr().out
    assert "resnet18, 1 blocks merged" in text and "merged accelerated" in text and "median of" in text


def test_errors_of_a_run(finished, tmp_path, capsys):
    config = f"--config={finished.config}"
    assert main(["prune", config, "--out", str(finished.dir), "--seed", "5"]) == 1
    assert "another configuration" in capsys.readouterr().err
    assert main(["prune", "--model", "nonsense", "--search.blocks", "1", "--out", str(tmp_path / "x")]) == 1
    assert "timm has no model 'nonsense'" in capsys.readouterr().err
    assert main(["prune", "--config", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read config" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [*STAGES[:-1], "prune"])
def test_each_stage_is_a_command(stage, asked):
    assert main([stage, "--out", "x"]) == 130
    assert [(settings.out, until) for settings, until in asked] == [
        (Path("x"), "compare" if stage == "prune" else stage)
    ]


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_lies_under_a_file_and_flags(effort, tmp_path, asked):
    file = tmp_path / "own.yaml"
    file.write_text("search:\n  blocks: 3\nfinetune:\n  lr: 0.5\n")
    assert main(["prune", "--effort", effort]) == 130
    assert main(["prune", f"--effort={effort}", "--config", str(file), "--search.metric", "top1"]) == 130
    (alone, _), (settings, _) = asked
    expected = from_dict(PruneConfig, EFFORTS[effort])
    assert alone == expected != PruneConfig()
    assert settings == replace(
        expected,
        search=replace(expected.search, blocks=3, metric="top1"),
        finetune=replace(expected.finetune, lr=0.5),
    )


def test_config_stands_anywhere_and_flags_win(tmp_path, asked):
    file = tmp_path / "with space.yaml"
    file.write_text("seed: 7\nmodel: resnet26\nsearch:\n  blocks: 3\n")
    flags = ["--seed", "8", "--search.force", "layer1.0"]
    lines = [
        ["prune", *config[0], *flags[:2], *config[1], *flags[2:], *config[2]]
        for given in ([f"--config={file}"], ["--config", str(file)])
        for config in ((given, [], []), ([], given, []), ([], [], given))
    ]
    lines.append([f"--config={file}", "prune", *flags])
    lines.append(["--config", str(file), "--quiet", "prune", *flags])
    for line in lines:
        assert main(line) == 130
    assert len(asked) == 8
    for settings, _ in asked:
        assert (settings.seed, settings.model, settings.search.blocks) == (8, "resnet26", 3)
        assert settings.search.force == ("layer1.0",)


@pytest.mark.parametrize(
    ("budget", "code"), [(BUDGET, 3), ({**BUDGET, "reached": 1.9, "met": True}, 0), (None, 0)]
)
def test_a_missed_budget_has_its_exit_code(finished, tmp_path, monkeypatch, capsys, budget, code):
    results = finished.results | ({"budget": budget} if budget else {})
    save_json(tmp_path / "results.json", results)
    monkeypatch.setattr(run, "prune", lambda settings, until: type("Run", (), {"dir": tmp_path}))
    monkeypatch.setattr(demo, "demo", lambda out: [finished.dir, tmp_path])
    for command in ("prune", "demo"):
        assert main([command]) == code
        shown = capsys.readouterr()
        assert "merged accelerated" in shown.out
        assert shown.err == (f"depthfuse: {tmp_path}: {budget_missed(results)}\n" if code else "")
    monkeypatch.setenv("RANK", "1")  # speaks for no one
    assert main(["prune"]) == 0
    assert capsys.readouterr().out == ""


def test_demo_prints_all_its_runs(finished, tmp_path, monkeypatch, capsys):
    asked = []
    save_json(tmp_path / "results.json", finished.results)
    monkeypatch.setattr(demo, "demo", lambda out: asked.append(out) or [finished.dir, tmp_path])
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert asked == [tmp_path] and capsys.readouterr().out.count("1 blocks merged") == 2
