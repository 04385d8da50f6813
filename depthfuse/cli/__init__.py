"""The command line: `depthfuse COMMAND --help` explains each command.

This module and the package's own import nothing heavy: `--help` answers at once, and Ctrl-C during the seconds that
torch and timm take to import is understood like any other.
"""

from __future__ import annotations

import difflib
import logging
import os
import select
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from depthfuse import __version__
from depthfuse.cli.command import (
    COMMON_FLAGS,
    DONE,
    EXIT_CODES,
    FAILED,
    INTERRUPTED,
    READER_GONE,
    WRONG_USAGE,
    Command,
    Given,
    take_apart,
)
from depthfuse.errors import DepthfuseError, UsageError

_IMAGENET = (
    "--model resnet34 --pretrained --data.data /data/imagenet --search.speedup 1.3 --out runs/resnet34"
)


def _stage(name: str, about: str) -> Command:
    return Command(
        name,
        f"prune:{name}",
        about,
        (f"depthfuse {name} {_IMAGENET}",),
        takes_config=True,
        takes_effort=True,
        resumes=True,
    )


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "prune",
            "prune:prune",
            "The whole job: baseline, supernet, search, progressive training, merge, acceleration, comparison. "
            "Can be stopped at any point and run again with the same flags.",
            (
                "depthfuse prune --search.blocks 4",
                f"depthfuse prune {_IMAGENET}",
                f"depthfuse prune --effort quick {_IMAGENET}",
                "depthfuse prune --model my_nets:build --task segmentation --data.data shapes --search.blocks 2",
                "depthfuse prune --config my.yaml --seed 1 --out runs/seed1",
            ),
            takes_config=True,
            takes_effort=True,
            resumes=True,
        ),
        _stage("baseline", "Only train (or take over) the baseline."),
        _stage("supernet", "The job up to the trained supernet."),
        _stage(
            "search",
            "The job up to the chosen subnet (subnet.json). Without a budget it leaves the front to pick from: "
            "front.csv and plots/front.png.",
        ),
        _stage("finetune", "The job up to the progressively trained subnet."),
        _stage("merge", "The job up to the merged model (merged.safetensors)."),
        Command(
            "pick",
            "pick:pick",
            "One net from what a search has scored, fine-tuned, merged and compared; nothing is trained or scored "
            "again that RUN has. First `depthfuse search` without a budget, a look at RUN/plots/front.png, then pick, "
            "as often as you like.",
            (
                "depthfuse search --model resnet34 --pretrained --data.data /data/imagenet --out runs/explored",
                "depthfuse pick runs/explored --speedup 1.3",
                "depthfuse pick runs/explored --points 1.0 --out runs/one_point",
                "depthfuse pick runs/explored --blocks 6",
            ),
            resumes=True,
        ),
        Command(
            "accelerate",
            "accelerate:accelerate",
            "Accelerate a model for this machine and save it as one file: a model by its name, the merged model of a "
            "run, or anew what was accelerated on another machine.",
            (
                "depthfuse accelerate resnet50 --pretrained --out fast.safetensors",
                "depthfuse accelerate resnet18 --weights w.safetensors --model-kwargs in_chans=1 --out f.safetensors",
                "depthfuse accelerate runs/resnet34 --dtype auto --out fast.safetensors",
                "depthfuse accelerate fast.safetensors --out here.safetensors",
            ),
        ),
        Command(
            "export",
            "export:export",
            "A model, the merged model of a run, or what was accelerated, as a file for another runtime: ONNX Runtime, "
            "OpenVINO, torch.export, AOTInductor, ExecuTorch, TensorRT, MIGraphX; compared there with the model.",
            (
                "depthfuse export runs/resnet34 --to onnx --out resnet34.onnx",
                "depthfuse export resnet50 --pretrained --to openvino --out resnet50.xml",
                "depthfuse export fast.safetensors --to executorch --largest-batch 8 --out fast.pte",
                "depthfuse export runs/resnet34 --to tensorrt --dynamic none --batch 8 --out resnet34.onnx",
            ),
        ),
        Command(
            "compare",
            "compare:compare",
            "Pruning methods on one model under equal conditions, over several budgets and seeds: ours, rivals after "
            "their papers, channel pruning, and two controls. Can be stopped at any point and run again.",
            (
                "depthfuse compare --methods updp depthshrinker --budgets speedup=1.26 --seeds 0 1",
                "depthfuse compare --config benchmarks/pruning/studies/cnn.yaml",
            ),
            takes_config=True,
            resumes=True,
        ),
        Command(
            "bench",
            "bench:bench",
            "Latency of a model, or of the merged model of a run, accelerated, eager, and in whatever compilers "
            "are installed, side by side; and what each operation costs.",
            (
                "depthfuse bench resnet34 --batch 1 8 --contenders eager",
                "depthfuse bench runs/resnet34 --dtype bf16",
            ),
        ),
        Command(
            "inspect",
            "costs:inspect",
            "Which blocks of a model can be pruned, why not the others, and what merging saves.",
            (
                "depthfuse inspect resnet34",
                "depthfuse inspect deit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=4",
                "depthfuse inspect torchvision:resnet50",
                "depthfuse inspect my_package.nets:build --model-kwargs width=32",
            ),
        ),
        Command(
            "latency",
            "costs:latency",
            "What merging each block of a model saves: measured here, or predicted for a GPU that is not here. "
            "The table can be pruned by on another machine.",
            (
                "depthfuse latency resnet34 --out table.json",
                "depthfuse latency resnet34 --device mi300x --dtype fp16 --batch 32 --out mi300x.json",
            ),
            resumes=True,
        ),
        Command(
            "demo",
            "prune:demo",
            "Prune a small CNN and a small ViT on the embedded images, in a few minutes on a CPU.",
            ("depthfuse demo --out runs/demo",),
            resumes=True,
        ),
        Command(
            "env",
            "env:env",
            "Versions, devices, which backend each op would use and why; whether the kernels compute right here.",
            ("depthfuse env", "depthfuse env --selftest"),
        ),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, one of `EXIT_CODES`."""
    command = None
    try:
        given = take_apart(sys.argv[1:] if argv is None else argv)
        command = _find(given)
        code = _answer(given) if command is None else _run(command, given)
        sys.stdout.flush()  # here, where a reader that has gone is understood
        return code
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" if command is not None and command.resumes else ""
        sys.stderr.write(f"depthfuse: stopped{goes_on}\n")
        return INTERRUPTED
    except UsageError as error:
        name = f" {command.name}" if command is not None else ""
        sys.stderr.write(f"depthfuse: {error}\ndepthfuse{name} --help explains the usage.\n")
        return WRONG_USAGE
    except (DepthfuseError, OSError) as error:
        if _drop_broken_outputs() and isinstance(error, BrokenPipeError):
            return READER_GONE
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        sys.stderr.write(f"depthfuse: {error}\n")
        return FAILED


def _find(given: Given) -> Command | None:
    """The command that is asked for; None where only flags are given."""
    name = given.words[0] if given.words else "-"
    if name.startswith("-"):
        return None
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown command {name!r}; {hint}known: {', '.join(COMMANDS)}")
    return COMMANDS[name]


def _answer(given: Given) -> int:
    """What is said without any command."""
    flag = given.words[0] if given.words else None
    if flag == "--version":
        sys.stdout.write(f"depthfuse {__version__}\n")
    elif flag in ("-h", "--help", None):
        sys.stdout.write(_help())
    else:
        raise UsageError(f"{flag} is given before any command: the command comes first")
    return WRONG_USAGE if flag is None else DONE


def _run(command: Command, given: Given) -> int:
    from depthfuse import log

    log.setup(given.verbosity)
    try:
        return command.run(given)
    except SystemExit as stop:  # tyro's, after --help and for flags that it cannot read
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or DONE
        raise


def _drop_broken_outputs() -> bool:
    """Whether whoever read standard output or error has gone. Python shall not write what is left to it at its end."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        broken = _has_no_reader(stream)
        gone = gone or broken
        try:
            stream.flush()
        except OSError:
            broken = True
        if broken:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone


def _has_no_reader(stream: TextIO) -> bool:
    # a flush that failed once may succeed the next time, with its text lost: only the system knows
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always told
    except (OSError, AttributeError):  # no file of the system; no poll on Windows
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _help() -> str:
    columns = min(shutil.get_terminal_size((100, 24)).columns, 120)
    sections = [
        "usage: depthfuse COMMAND [FLAGS]",
        "Make vision networks shallower, and run what is left fast.",
        _table({command.name: command.about for command in COMMANDS.values()}, columns),
        "Flags of every command, wherever they stand:\n"
        + _table({**COMMON_FLAGS, "--help": "explain the command's own flags, with examples"}, columns),
        "Of depthfuse alone:\n" + _table({"--version": "the version of depthfuse"}, columns),
        "Examples:\n"
        "  depthfuse demo                        see it work, in a few minutes on a CPU\n"
        "  depthfuse inspect resnet34            which blocks can be pruned\n"
        "  depthfuse prune --search.blocks 4     prune on the embedded images\n"
        "  depthfuse accelerate resnet50 --pretrained --out fast.safetensors",
        "Exit codes:\n" + _table({str(code): meaning for code, meaning in EXIT_CODES.items()}, columns),
        "depthfuse COMMAND --help explains its flags.",
    ]
    return "\n\n".join(sections) + "\n"


def _table(rows: dict[str, str], columns: int) -> str:
    """Names and what they mean, in two columns."""
    width = max(map(len, rows))
    lines = []
    for name, meaning in rows.items():
        head, indent = f"  {name:<{width}}  ", " " * (width + 4)
        lines.append(textwrap.fill(meaning, max(columns, 60), initial_indent=head, subsequent_indent=indent))
    return "\n".join(lines)
