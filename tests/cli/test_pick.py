"""`depthfuse pick`: its flags are the wishes; what is printed, and what is wrong usage."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from depthfuse.cli import main
from depthfuse.runs import pick


@pytest.fixture
def asked(monkeypatch, finished):
    """What is asked of `pick`, which gives the finished run."""
    asked = []

    def fake(folder, **wishes):
        asked.append((folder, {name: value for name, value in wishes.items() if value is not None}))
        return SimpleNamespace(dir=finished.dir)

    monkeypatch.setattr(pick, "pick", fake)
    return asked


def test_a_picked_net_is_printed(asked, capsys):
    assert main(["pick", "runs/explored", "--points", "1"]) == 0
    assert main(["pick", "runs/explored", "--speedup=1.3", "--out", "x", "--allow", "my_nets:build"]) == 0
    assert asked == [
        (Path("runs/explored"), {"points": 1.0}),
        (Path("runs/explored"), {"speedup": 1.3, "out": Path("x")}),
    ]
    assert "resnet18, 1 blocks merged" in capsys.readouterr().out


def test_a_run_without_a_search_is_named(finished, capsys):
    assert main(["pick", str(finished.dir), "--blocks", "1"]) == 1
    assert f"{finished.dir} holds no finished search (front.csv)" in capsys.readouterr().err
    assert main(["pick"]) == 2
