"""The command line: `depthfuse COMMAND --help` explains each command."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from depthfuse import config, log
from depthfuse.acceleration import AccelerationError
from depthfuse.costs.table import CostTable
from depthfuse.data import DataError
from depthfuse.errors import (
    BudgetError,
    CheckpointError,
    CostError,
    MergeError,
    MethodError,
    SpecError,
    TrainingDiverged,
)

# what a user can cause and mend: shown as one line, not as a traceback
USER_ERRORS = (
    AccelerationError,
    BudgetError,
    CheckpointError,
    CostError,
    DataError,
    MergeError,
    MethodError,
    SpecError,
    TrainingDiverged,
    config.ConfigError,
    OSError,
)


def _take_config(args: Sequence[str], default: Any) -> tuple[list[str], Any]:
    """The arguments without `--config FILE`, and the defaults that the file gives."""
    args = list(args)
    if "--config" in args:
        at = args.index("--config")
        if at + 1 == len(args):
            raise config.ConfigError("--config needs the path of a YAML file")
        default = config.load_yaml(args[at + 1], type(default))
        del args[at : at + 2]
    return args, default


def _prune_command(stage: str) -> Callable[[Sequence[str], str], None]:
    """The whole job up to a stage; flags over the entries of --config over the defaults."""

    def command(args: Sequence[str], prog: str) -> None:
        args, default = _take_config(args, config.PruneConfig())
        description = (
            f"{COMMANDS[prog.split()[-1]][1]}\n\nEvery flag can also stand in a YAML file: --config FILE."
        )
        settings = tyro.cli(
            config.PruneConfig, args=args, prog=prog, description=description, default=default
        )
        from depthfuse.runs.run import prune

        run = prune(settings, until=stage)
        if stage == "compare" and log.is_main_process():
            _print_results([run.dir])

    return command


@dataclass(frozen=True)
class CompareArguments(config.CompareConfig):
    until: Literal["prepare", "train", "measure"] = "measure"
    """The last step to do. Latencies are measured in the first and the last: nothing else may run then. Training may be
    split: several processes with the same --out and different --seeds, then one with all seeds."""


def _compare(args: Sequence[str], prog: str) -> None:
    args, default = _take_config(args, CompareArguments())
    given = tyro.cli(
        CompareArguments, args=args, prog=prog, description=COMMANDS["compare"][1], default=default
    )
    from depthfuse.rivals.compare import compare

    settings = {f.name: getattr(given, f.name) for f in dataclasses.fields(config.CompareConfig)}
    out = compare(config.CompareConfig(**settings), given.until)
    if given.until == "measure" and log.is_main_process():
        _print_comparison(out)


def _print_comparison(directory: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from depthfuse.checkpoint import load_json
    from depthfuse.rivals.compare_report import RESULTS, table_rows

    results = load_json(directory / "results.json", RESULTS)
    head, *rows = table_rows(results)
    table = Table(*head, title=f"{results['model']} ({directory})")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_results(directories: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from depthfuse.checkpoint import load_json
    from depthfuse.runs.report import RESULTS, comparison_rows

    console = Console()
    for directory in directories:
        results = load_json(directory / "results.json", RESULTS)
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

    from depthfuse.costs.inspection import inspect_model
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


@dataclass
class LatencyArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A timm model name (random weights)."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of timm.create_model, as name=value."""
    batch: int = 1
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    device: config.LatencyDevice = "here"
    """Measured here, or predicted by a roofline for another device."""
    input_size: tuple[int, int, int] | None = None
    """Channels, height, width; default the model's own."""
    rounds: int = 15
    """Interleaved rounds."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    out: Path = Path("latency.json")
    """The table, for --latency.table of other commands. One cut short under the same conditions is completed,
    any other is overwritten."""
    check: int = 0
    """Also time this many random subnets as wholes, and say how far the table's sums are off."""


def _latency(args: Sequence[str], prog: str) -> None:
    given = tyro.cli(LatencyArguments, args=args, prog=prog, description=COMMANDS["latency"][1])
    import torch

    from depthfuse.benching.bench import randomised
    from depthfuse.costs import latency
    from depthfuse.merging.model_inputs import input_size
    from depthfuse.merging.supernet import Supernet
    from depthfuse.spec import ModelSource

    if given.check and given.device != "here":
        raise config.ConfigError(f"--check measures here: it cannot check a prediction for {given.device}")
    source = ModelSource.make(given.model, **config.parse_model_kwargs(given.model_kwargs))
    model = randomised(source.build())
    size = given.input_size or input_size(model)
    supernet = randomised(Supernet(model)).to("cuda" if torch.cuda.is_available() else "cpu")
    settings = config.LatencyConfig(
        batch_size=given.batch,
        dtype=given.dtype,
        rounds=given.rounds,
        backend=given.backend,
        device=given.device,
    )
    table = latency.make_latencies(supernet, size, settings, cache=given.out)
    _print_latencies(table, given.out)
    if given.check:
        checked = latency.check_prediction(supernet, size, settings, table, given.check)
        _print_check(checked, latency.relative_errors(checked))


def _print_latencies(table: CostTable, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = table.conditions
    how = f"PREDICTED ({facts['source']})" if facts["predicted"] else "measured"
    threads = f", {facts['threads']} threads" if facts["threads"] else ""
    title = (
        f"{facts['model']}, {how}: {table.whole:.3f} ms accelerated; {facts['device']}{threads}, {facts['dtype']}, "
        f"batch {facts['batch_size']}, torch {facts['torch']}"
    )
    rows = Table("block", "merge candidate", "saves ms", "% of the whole", title=title)
    for path, saved in table.saved.items():
        for name, saved_ms in saved.items():
            rows.add_row(path, name, table.saving_in_words(path, name), f"{100 * saved_ms / table.whole:.2f}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(rows)
    console.print(f"table: {out}", soft_wrap=True)


def _print_check(checked: Sequence[tuple[dict[str, str], float, float]], errors: Sequence[float]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = Table("blocks merged", "sum ms", "measured ms", "error %", title="random subnets as wholes")
    for (choices, predicted_ms, measured_ms), error in zip(checked, errors, strict=True):
        rows.add_row(str(len(choices)), f"{predicted_ms:.3f}", f"{measured_ms:.3f}", f"{100 * error:.1f}")
    console.print(rows)
    mean, most = 100 * sum(errors) / len(errors), 100 * max(errors)
    console.print(f"relative error of the sums: mean {mean:.1f} %, largest {most:.1f} %")


def _env(args: Sequence[str], prog: str) -> None:
    tyro.cli(lambda: None, args=args, prog=prog, description=COMMANDS["env"][1])
    from depthfuse.env import render

    sys.stdout.write(render() + "\n")


@dataclass
class BenchArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A timm model name (random weights), or the output folder of a run that has been merged."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of timm.create_model, as name=value."""
    batch: tuple[int, ...] = (1, 8, 32, 128)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    contenders: tuple[str, ...] = ()
    """Which to compare with; default all that are installed."""
    rounds: int = 15
    """Interleaved rounds."""
    round_ms: float = 150.0
    """Time for each contender in each round."""
    device: str | None = None
    """Default: the GPU where there is one."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    out: Path | None = None
    """Where tables and plot go; default the run's folder, or runs/bench/MODEL."""


def _bench(args: Sequence[str], prog: str) -> None:
    given = tyro.cli(BenchArguments, args=args, prog=prog, description=COMMANDS["bench"][1])
    import torch

    from depthfuse.benching import bench
    from depthfuse.benching.engines import CONTENDERS

    unknown = [name for name in given.contenders if name not in CONTENDERS]
    if unknown:
        raise config.ConfigError(f"unknown contender {unknown[0]!r}; known: {', '.join(CONTENDERS)}")
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, size, out = _bench_model(given)
    dtype = bench.DTYPES[given.dtype]
    model = model.to(device, dtype)
    facts = bench.machine(device)
    rows: list[dict[str, Any]] = []
    for batch in given.batch:
        x = torch.randn(batch, *size, device=device).to(dtype)
        if not rows:
            report = bench.operations(model, x, given.backend)
        names = given.contenders or tuple(CONTENDERS)
        rows += bench.compare(model, given.model, x, names, given.rounds, given.round_ms, given.backend)
    out = given.out or out
    bench.write_csv(rows, out / f"bench_{device.type}_{given.dtype}.csv", facts)
    bench.write_csv(report.rows(), out / f"operations_{device.type}_{given.dtype}.csv", facts)
    title = f"{facts['device']}, {facts['threads']} threads, {given.dtype}, torch {facts['torch']}"
    bench.plot(rows, out / f"bench_{device.type}_{given.dtype}.png", title)
    _print_bench(rows, str(report), f"{given.model}: {title}", out)


def _bench_model(given: BenchArguments) -> tuple[Any, list[int], Path]:
    """The model in evaluation mode, its input size (C, H, W), and the folder for results."""
    from depthfuse.benching import bench
    from depthfuse.checkpoint import load_json
    from depthfuse.merging.model_inputs import input_size
    from depthfuse.runs.report import RESULTS
    from depthfuse.runs.run import load
    from depthfuse.spec import ModelSource

    directory = Path(given.model)
    if directory.is_dir():
        return (
            load(directory),
            load_json(directory / "results.json", RESULTS)["conditions"]["input_size"],
            directory,
        )
    source = ModelSource.make(given.model, **config.parse_model_kwargs(given.model_kwargs))
    model = bench.randomised(source.build())
    return model, list(input_size(model)), Path("runs") / "bench" / given.model


def _print_bench(rows: list[dict[str, Any]], report: str, title: str, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report, soft_wrap=True, highlight=False, markup=False)
    table = Table(
        "batch", "contender", "median ms", "quartiles ms", "time / ours", "quartiles", "error", title=title
    )
    for row in rows:
        table.add_row(
            str(row["batch"]),
            row["contender"],
            f"{row['latency_ms']:.3f}",
            f"{row['latency_q1_ms']:.3f} to {row['latency_q3_ms']:.3f}",
            f"{row['ratio_to_depthfuse']:.2f}",
            f"{row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}",
            row["max_relative_error"],
        )
    console.print(table)
    console.print(f"tables and plot: {out}", soft_wrap=True)


@dataclass
class DemoArguments:
    out: Path = Path("runs/demo")
    """Where the two runs go."""


def _demo(args: Sequence[str], prog: str) -> None:
    given = tyro.cli(DemoArguments, args=args, prog=prog, description=COMMANDS["demo"][1])
    from depthfuse.runs.demo import demo

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
    "compare": (
        _compare,
        "Pruning methods on one model under equal conditions, over several budgets and seeds: ours, rivals after their "
        "papers, channel pruning, and two controls. Can be stopped at any point and run again.",
    ),
    "bench": (
        _bench,
        "Latency of a timm model, or of the merged model of a run, accelerated, eager, and in whatever compilers are "
        "installed, side by side; and what each operation costs.",
    ),
    "inspect": (
        _inspect,
        "Which blocks of a timm model can be pruned, why not the others, and what merging saves.",
    ),
    "latency": (
        _latency,
        "What merging each block of a timm model saves: measured here, or predicted for a GPU that is not here. The "
        "table can be pruned by on another machine.",
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
