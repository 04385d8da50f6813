"""Log lines and progress: on a terminal, elsewhere, quiet, and on other ranks."""

import io
import logging
import types

import pytest
from rich.console import Console

from depthfuse import log

pytestmark = pytest.mark.usefixtures("restored_logger")


@pytest.fixture
def terminal(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(log, "console", console)
    return console.file


@pytest.fixture
def no_terminal(monkeypatch):
    monkeypatch.setattr(log, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(log, "console", Console(file=io.StringIO(), force_terminal=False))


def run_loop():
    with log.progress("training", total=5, done=2) as bar:
        for _ in range(3):
            bar.advance(loss=0.123456, lam=1)


def test_plain_lines_elsewhere(no_terminal, capsys, monkeypatch):
    log.setup()
    logging.getLogger("depthfuse.training.loop").info("started")
    run_loop()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 2)[1:] for line in lines] == [
        ["INFO", "started"],
        ["INFO", "training: 5/5, 0 s, loss 0.1235, lam 1"],
    ]
    monkeypatch.setattr(log, "_PLAIN_INTERVAL_S", 0.0)
    run_loop()
    counts = [line.split()[3] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["3/5,", "4/5,", "5/5,"]


def test_bar_on_a_terminal(terminal, capsys):
    log.setup()
    logging.getLogger("depthfuse.training.loop").info("started")
    run_loop()
    shown = terminal.getvalue()
    assert "started" in shown and "training" in shown and "5/5" in shown and "loss 0.1235, lam 1" in shown
    assert capsys.readouterr().err == ""


def test_quiet_shows_warnings_only(terminal):
    log.setup(-1)
    logging.getLogger("depthfuse.training.loop").info("hidden")
    run_loop()
    assert terminal.getvalue() == ""
    logging.getLogger("depthfuse.training.loop").warning("careful")
    assert "careful" in terminal.getvalue()


def test_other_ranks_are_silent(no_terminal, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log.setup(1)
    logging.getLogger("depthfuse.training.loop").warning("hidden")
    run_loop()
    assert capsys.readouterr().err == ""


def test_details_on_request(no_terminal, capsys):
    log.setup(1)
    logging.getLogger("depthfuse.training.loop").debug("fine print")
    assert "DEBUG fine print" in capsys.readouterr().err
    log.setup(0)  # replaces, and does not add
    logging.getLogger("depthfuse.training.loop").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_an_interrupted_loop_raises_as_it_is(no_terminal):
    log.setup()
    with pytest.raises(KeyboardInterrupt), log.progress("training", total=2):
        raise KeyboardInterrupt


def test_unknown_verbosity():
    with pytest.raises(ValueError, match="not 7"):
        log.setup(7)
