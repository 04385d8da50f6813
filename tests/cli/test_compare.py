"""`depthfuse compare`: its settings, what it prints at its end, and bad input."""

from pathlib import Path

import pytest

from depthfuse.cli import main, tables
from depthfuse.config import CompareConfig
from depthfuse.rivals import compare


@pytest.fixture
def asked(monkeypatch):
    """The settings and the step that a comparison is asked for, and the folders that are printed."""
    asked, printed = [], []
    monkeypatch.setattr(compare, "compare", lambda *given: asked.append(given) or Path("there"))
    monkeypatch.setattr(tables, "print_comparison", printed.append)
    return asked, printed


def test_settings_and_steps(asked, tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("methods: [drop]\nuntil: train\nseeds: [4]\n")
    assert main(["compare", f"--config={file}", "--seeds", "5", "6"]) == 0
    assert main(["compare", "--config", str(file), "--until", "measure"]) == 0
    assert main(["compare"]) == 0
    monkeypatch.setenv("RANK", "1")
    assert main(["compare"]) == 0
    settings, printed = asked
    assert settings == [
        (CompareConfig(methods=("drop",), seeds=(5, 6)), "train"),
        (CompareConfig(methods=("drop",), seeds=(4,)), "measure"),
        (CompareConfig(), "measure"),
        (CompareConfig(), "measure"),
    ]
    assert printed == [Path("there")] * 2


def test_bad_input_is_named(capsys, tmp_path):
    assert main(["compare", "--methods", "magic", "--out", str(tmp_path / "out")]) == 1
    assert "unknown method 'magic'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["compare", "--until", "nap"]) == 2
