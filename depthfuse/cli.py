"""The command line: `depthfuse COMMAND --help` explains each command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from depthfuse import config, log
from depthfuse.accelerate import AccelerationError
from depthfuse.checkpoint import CheckpointError
from depthfuse.data import DataError
from depthfuse.latency import LatencyError
from depthfuse.merge import MergeError
from depthfuse.search import BudgetError
from depthfuse.spec import SpecError
from depthfuse.train import TrainingDiverged

# what a user can cause and mend: shown as one line, not as a traceback
USER_ERRORS = (
    AccelerationError,
    BudgetError,
    CheckpointError,
    DataError,
    LatencyError,
    MergeError,
    SpecError,
    TrainingDiverged,
    config.ConfigError,
    OSError,
)


def _prune_command(stage: str) -> Callable[[Sequence[str], str], None]:
    """The whole job up to a stage; flags over the entries of --config over the defaults."""

    def command(args: Sequence[str], prog: str) -> None:
        args, default = list(args), config.PruneConfig()
        if "--config" in args:
            at = args.index("--config")
            if at + 1 == len(args):
                raise config.ConfigError("--config needs the path of a YAML file")
            default = config.load_yaml(args[at + 1])
            del args[at : at + 2]
        description = (
            f"{COMMANDS[prog.split()[-1]][1]}\n\nEvery flag can also stand in a YAML file: --config FILE."
        )
        settings = tyro.cli(
            config.PruneConfig, args=args, prog=prog, description=description, default=default
        )
        from depthfuse.pipeline import prune

        run = prune(settings, until=stage)
        if stage == "compare" and log.is_main_process():
            _print_results([run.dir])

    return command


def _print_results(directories: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from depthfuse.checkpoint import load_json
    from depthfuse.report import comparison_rows

    console = Console()
    for directory in directories:
        results = load_json(directory / "results.json")
        head, *rows = comparison_rows(results)
        table = Table(
            *head, title=f"{results['model']}, {len(results['choices'])} blocks merged ({directory})"
        )
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("* over the accelerated baseline, median of interleaved rounds")


@dataclass
class InspectArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A timm model name."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of timm.create_model, as name=value."""


def _inspect(args: Sequence[str], prog: str) -> None:
    given = tyro.cli(InspectArguments, args=args, prog=prog, description=COMMANDS["inspect"][1])
    from rich.console import Console
    from rich.table import Table

    from depthfuse.inspection import inspect_model
    from depthfuse.spec import ModelSource

    source = ModelSource.make(given.model, **config.parse_model_kwargs(given.model_kwargs))
    rows, remark = inspect_model(source.build())
    table = Table(
        "block",
        "type",
        "merge candidate",
        "MACs",
        "merged",
        "parameters",
        "merged",
        "remark",
        title=given.model,
    )
    for row in rows:
        if row.candidate is None:
            table.add_row(row.block, row.block_type, "-", "", "", "", "", row.reason)
        else:
            numbers = (row.macs_before, row.macs_after, row.parameters_before, row.parameters_after)
            table.add_row(row.block, row.block_type, row.candidate, *(f"{n:,}" for n in numbers), row.reason)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if remark:
        console.print(remark)


def _env(args: Sequence[str], prog: str) -> None:
    tyro.cli(lambda: None, args=args, prog=prog, description=COMMANDS["env"][1])
    from depthfuse.env import render

    sys.stdout.write(render() + "\n")


@dataclass
class DirectoryArguments:
    directory: Annotated[Path, tyro.conf.Positional]
    """The output folder of a run that has been merged."""
    batch_size: int = 1
    rounds: int = 15
    """Interleaved rounds."""
    backend: Literal["auto", "triton", "reference"] = "auto"


def _bench(args: Sequence[str], prog: str) -> None:
    given = tyro.cli(DirectoryArguments, args=args, prog=prog, description=COMMANDS["bench"][1])
    import torch
    from rich.console import Console
    from rich.table import Table

    from depthfuse.accelerate import accelerate
    from depthfuse.checkpoint import load_json
    from depthfuse.pipeline import load
    from depthfuse.timing import time_interleaved

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(given.directory).to(device)
    size = load_json(given.directory / "results.json")["conditions"]["input_size"]
    x = torch.randn(given.batch_size, *size, device=device)
    fast = accelerate(model, x, backend=given.backend)
    times = time_interleaved({"merged": lambda: model(x), "accelerated": lambda: fast(x)}, given.rounds)
    table = Table(
        "net", "median ms", "quartiles ms", "speed-up", title=f"{given.directory}, batch {given.batch_size}"
    )
    for name, timing in times.items():
        low, high = timing.quartiles_ms
        ratio = timing.speedup_over(times["merged"])
        table.add_row(name, f"{timing.median_ms:.3f}", f"{low:.3f} to {high:.3f}", f"{ratio:.2f}x")
    console = Console()
    console.print(table)
    console.print(str(fast.report()))


@dataclass
class DemoArguments:
    out: Path = Path("runs/demo")
    """Where the two runs go."""


def _demo(args: Sequence[str], prog: str) -> None:
    given = tyro.cli(DemoArguments, args=args, prog=prog, description=COMMANDS["demo"][1])
    from depthfuse.demo import demo

    _print_results(demo(given.out))


COMMANDS: dict[str, tuple[Callable[[Sequence[str], str], None], str]] = {
    "prune": (
        _prune_command("compare"),
        "The whole job: baseline, supernet, search, progressive training, merge, acceleration, comparison. "
        "Can be stopped at any point and run again with the same flags.",
    ),
    "baseline": (_prune_command("baseline"), "Only train (or take over) the baseline."),
    "supernet": (_prune_command("supernet"), "The job up to the trained supernet."),
    "search": (_prune_command("search"), "The job up to the chosen subnet (subnet.json)."),
    "finetune": (_prune_command("finetune"), "The job up to the progressively trained subnet."),
    "merge": (_prune_command("merge"), "The job up to the merged model (merged.safetensors)."),
    "accelerate": (
        _prune_command("compare"),
        "The same as prune: acceleration and comparison are its last stage.",
    ),
    "bench": (_bench, "Latency of the merged model of a run, plain and accelerated, side by side."),
    "inspect": (
        _inspect,
        "Which blocks of a timm model can be pruned, why not the others, and what merging saves.",
    ),
    "demo": (_demo, "Prune a small CNN and a small ViT on the embedded images, in a few minutes on a CPU."),
    "env": (_env, "Versions, devices, and which backend each op would use and why."),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: depthfuse COMMAND [FLAGS]",
        "",
        "Make vision networks shallower, and run what is left fast.",
        "",
    ]
    lines += [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "depthfuse COMMAND --help explains its flags.", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 failed with a message, 2 wrong usage, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if args else 2
    if args[0] not in COMMANDS:
        sys.stderr.write(f"depthfuse: unknown command {args[0]!r}; known: {', '.join(COMMANDS)}\n")
        return 2
    log.setup()
    command: Any = COMMANDS[args[0]][0]
    try:
        command(args[1:], f"depthfuse {args[0]}")
    except KeyboardInterrupt:
        sys.stderr.write("depthfuse: stopped; the same command goes on from here\n")
        return 130
    except USER_ERRORS as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        sys.stderr.write(f"depthfuse: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
