"""`depthfuse bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from depthfuse.cli.command import Invocation


@dataclass
class BenchArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A name of timm's, torchvision:NAME or package.module:factory (random weights), or the output folder of a run that
    has been merged."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of what builds it (timm.create_model), as name=value."""
    batch: tuple[int, ...] = (1, 8, 32, 128)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    contenders: tuple[str, ...] = ()
    """Which to compare with; default all that are installed."""
    rounds: int = 15
    """Interleaved rounds."""
    round_ms: float = 150.0
    """Time for each contender in each round."""
    busy: int = 0
    """On a CPU: time single calls beside so many busy processes, too."""
    device: str | None = None
    """Default: the GPU where there is one."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    out: Path | None = None
    """Where tables, plot and page go; default the run's folder, or runs/bench/MODEL."""


def bench(invocation: Invocation) -> None:
    given = invocation.settings(BenchArguments)
    import torch

    from depthfuse.benching import bench, page
    from depthfuse.benching.engines import ENGINES, OURS
    from depthfuse.checkpoint import save_text
    from depthfuse.cli.models import chosen_device, require_positive
    from depthfuse.cli.tables import print_bench
    from depthfuse.config import DTYPES
    from depthfuse.errors import ConfigError

    require_positive(rounds=given.rounds)
    device = chosen_device(given.device)
    for batch in given.batch:
        require_positive(batch=batch)
    if given.busy < 0 or (given.busy and device.type != "cpu"):
        raise ConfigError(
            f"--busy is {given.busy} on {device.type}, expected a number of processes, on a CPU"
        )
    unknown = [name for name in given.contenders if name not in (OURS, *ENGINES)]
    if unknown:
        raise ConfigError(f"unknown contender {unknown[0]!r}; known: {', '.join((OURS, *ENGINES))}")
    model, size, out = _bench_model(given)
    dtype = DTYPES[given.dtype]
    model = model.to(device, dtype)
    facts = bench.machine(device)
    rows: list[dict[str, Any]] = []
    for batch in given.batch:
        x = torch.randn(batch, *size, device=device).to(dtype)
        if not rows:
            report = bench.operations(model, x, given.backend)
        names = given.contenders or tuple(ENGINES)
        rows += bench.compare(
            model, given.model, x, names, given.rounds, given.round_ms, given.backend, given.busy
        )
    out = given.out or out
    bench.write_csv(rows, out / f"bench_{device.type}_{given.dtype}.csv", facts)
    bench.write_csv(report.rows(), out / f"operations_{device.type}_{given.dtype}.csv", facts)
    title = f"{facts['device']}, {facts['threads']} threads, {given.dtype}, torch {facts['torch']}"
    bench.ratios(rows, title).save_png(out / f"bench_{device.type}_{given.dtype}.png")
    save_text(out / f"bench_{device.type}_{given.dtype}.html", page.html(rows, report, given.model, facts))
    print_bench(rows, str(report), f"{given.model}: {title}", out)


def _bench_model(given: BenchArguments) -> tuple[Any, tuple[int, int, int], Path]:
    """The model in evaluation mode, its input size (C, H, W), and the folder for results."""
    from depthfuse.benching.bench import randomised
    from depthfuse.cli.models import merged_model, named_source, refuse_for, run_folder
    from depthfuse.merging.model_inputs import input_size

    folder = run_folder(given.model)
    if folder is not None:
        refuse_for("the model of a run", model_kwargs=given.model_kwargs)
        return *merged_model(folder), folder
    model = randomised(named_source(given.model, given.model_kwargs).build())
    return model, input_size(model), Path("runs") / "bench" / given.model
