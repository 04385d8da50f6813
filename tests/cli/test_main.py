"""`main`: help, the exit codes, and ends that nobody planned: Ctrl-C, and readers that go away."""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import depthfuse.cli
import depthfuse.cli.env
import depthfuse.config
from depthfuse import __version__
from depthfuse.cli import COMMANDS, main
from depthfuse.cli.command import EXIT_CODES
from depthfuse.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


class Parsed(Exception):
    """The flags of a command have been read."""


@pytest.fixture
def parse_only(monkeypatch):
    """Commands end where their flags have been read; config files are not."""
    read = tyro.cli

    def parse(*args, **kwargs):
        read(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse)
    monkeypatch.setattr(depthfuse.config, "load_yaml", lambda path, kind, under: kind())


def does(monkeypatch, action):
    """`depthfuse env` does something else."""
    monkeypatch.setattr(depthfuse.cli.env, "env", action)


def raises(error):
    def action(invocation):
        raise error

    return action


def test_help_and_version(capsys):
    assert main(["--help"]) == main(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert all(f"\n  {code} " in text for code in EXIT_CODES)
    assert all(flag in text for flag in ("--verbose", "--quiet", "--version", "--help"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"depthfuse {__version__}\n"
    assert main([]) == 2
    assert "usage: depthfuse COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(name, capsys):
    assert main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"usage: depthfuse {name} " in text and COMMANDS[name].about in text
    assert all(example in text for example in COMMANDS[name].examples)
    assert "--verbose" in text and "--quiet" in text
    assert ("--config FILE" in text) == COMMANDS[name].takes_config
    assert ("--effort WORD" in text) == COMMANDS[name].takes_effort


def test_examples_are_command_lines(parse_only, capsys):
    main(["--help"])
    shown = re.findall(r"^  depthfuse (.*?)(?:   .*)?$", capsys.readouterr().out, re.MULTILINE)
    assert len(shown) == 4
    for example in [*shown, *(e for command in COMMANDS.values() for e in command.examples)]:
        with pytest.raises(Parsed):
            main(shlex.split(example.removeprefix("depthfuse ")))


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\n"
        "from depthfuse.cli import main\n"
        "assert main(['--help']) == main(['--version']) == 0 and main(['prnue']) == 2\n"
        "print([name for name in ('torch', 'timm', 'numpy', 'tyro', 'rich') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fly"], "unknown command 'fly'; known: prune, baseline"),
        (["prnue"], "unknown command 'prnue'; did you mean 'prune'? known: prune"),
        (["--fast", "prune"], "--fast is given before any command"),
        (["env", "--config", "a.yaml"], "depthfuse env takes no --config"),
        (["prune", "--config"], "--config needs the path of a YAML file"),
        (["prune", "--config="], "--config needs the path of a YAML file"),
        (["prune", "--config", "--out", "x"], "--config needs the path of a YAML file"),
        (["prune", "--config=a.yaml", "--config", "b.yaml"], "more than once (a.yaml, b.yaml)"),
        (["env", "--effort", "quick"], "depthfuse env takes no --effort"),
        (["prune", "--effort", "heroic"], "unknown effort 'heroic'; known: quick, normal, thorough"),
        (["prune", "--effort", "--seed"], "--effort needs a word: --effort quick|normal|thorough"),
        (["prune", "--effort=quick", "--effort", "normal"], "more than once (quick, normal)"),
        (["env", "--verbose", "--quiet"], "--verbose and --quiet contradict each other"),
    ],
)
def test_wrong_usage(args, message, capsys):
    assert main(args) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "--help explains" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    "args", [["prune", "--fast"], ["inspect"], ["bench", "a", "--dtype", "int4"], ["env", "all"]]
)
def test_flags_that_cannot_be_read_are_wrong_usage(args, capsys):
    assert main(args) == 2
    assert "depthfuse" in capsys.readouterr().err


def test_errors_of_ours_and_of_the_system_are_one_line(monkeypatch, capsys):
    for error in (DataError("no such folder"), FileNotFoundError(2, "No such file", "x.csv")):
        does(monkeypatch, raises(error))
        assert main(["env"]) == 1
        assert capsys.readouterr().err == f"depthfuse: {error}\n"
    does(monkeypatch, raises(ZeroDivisionError()))  # a mistake of ours: nothing hides it
    with pytest.raises(ZeroDivisionError):
        main(["env"])


def test_verbose_shows_where_an_error_came_from(capsys):
    for args in (["inspect", "nonsense"], ["--quiet", "inspect", "nonsense"]):
        assert main(args) == 1
        assert "Traceback" not in capsys.readouterr().err
    for args in (["inspect", "nonsense", "--verbose"], ["--verbose", "inspect", "nonsense"]):
        assert main(args) == 1
        shown = capsys.readouterr().err
        assert "Traceback" in shown and "raise SpecError" in shown
        assert shown.endswith("depthfuse: timm has no model 'nonsense' (timm.list_models() lists all)\n")


def test_verbosity(monkeypatch, capsys):
    def action(invocation):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger("depthfuse.data").log(level, "at %d", level)

    does(monkeypatch, action)
    shown = {}
    for flag in ("--verbose", None, "--quiet"):
        assert main(["env", *([flag] if flag else [])]) == 0
        shown[flag] = re.findall(r"at (\d+)", capsys.readouterr().err)
    assert shown == {"--verbose": ["10", "20", "30"], None: ["20", "30"], "--quiet": ["30"]}


def test_an_interrupt_says_whether_the_command_goes_on(monkeypatch, capsys):
    does(monkeypatch, raises(KeyboardInterrupt))
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "depthfuse: stopped\n"
    monkeypatch.setattr("depthfuse.runs.run.prune", lambda settings, until: raises(KeyboardInterrupt)(None))
    assert main(["search"]) == 130
    assert capsys.readouterr().err == "depthfuse: stopped; the same command goes on from here\n"


@pytest.mark.parametrize(
    "start",
    [["-m", "depthfuse.cli"], ["-c", "import sys; from depthfuse.cli import main; sys.exit(main())"]],
    ids=["module", "console script"],
)
def test_an_interrupt_while_torch_is_imported(start, tmp_path):
    """A real SIGINT, sent by the process to itself when it is asked to find torch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    result = subprocess.run(
        [sys.executable, *start, "env"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (result.returncode, result.stderr) == (130, "depthfuse: stopped\n")


@pytest.fixture
def nobody_reads():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@pytest.mark.parametrize(
    "args", [["--help"], ["env"], ["inspect", "--help"], ["inspect", "test_resnet"]], ids=" ".join
)
def test_a_reader_that_has_gone_ends_it_quietly(args, nobody_reads, monkeypatch, capsys):
    with monkeypatch.context() as patch:  # here: pytest sets standard output anew when a test's call begins
        patch.setattr(sys, "stdout", nobody_reads)
        assert main([*args, "--quiet"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("module", ["depthfuse", "depthfuse.cli"])
def test_python_starts_it(module):
    said = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith("usage: depthfuse COMMAND [FLAGS]")


def test_a_reader_that_has_gone_leaves_nothing_to_the_end_of_the_process(nobody_reads):
    command = [sys.executable, "-m", "depthfuse.cli", "--help"]
    result = subprocess.run(command, stdout=nobody_reads, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capsys):
    does(monkeypatch, raises(BrokenPipeError(32, "Broken pipe")))
    assert main(["env"]) == 1
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "depthfuse.cli", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    assert result.stderr == "depthfuse: [Errno 28] No space left on device\n"


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "inverted_residual: " in text
