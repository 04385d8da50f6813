"""`depthfuse inspect` and `depthfuse latency`: what there is to prune, and what it would save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from depthfuse.cli import tables
from depthfuse.cli.command import Invocation
from depthfuse.config import LatencyDevice


@dataclass
class InspectArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A name of timm's, torchvision:NAME, or package.module:factory."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of what builds it (timm.create_model), as name=value."""


def inspect(invocation: Invocation) -> None:
    given = invocation.settings(InspectArguments)
    from depthfuse.cli.models import named_source
    from depthfuse.costs.inspection import inspect_model

    rows, remark = inspect_model(named_source(given.model, given.model_kwargs).build())
    tables.print_inspection(given.model, rows, remark)


@dataclass
class LatencyArguments:
    model: Annotated[str, tyro.conf.Positional]
    """A name of timm's, torchvision:NAME, or package.module:factory (random weights)."""
    model_kwargs: tuple[str, ...] = ()
    """Keyword arguments of what builds it (timm.create_model), as name=value."""
    batch: int = 1
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    device: LatencyDevice = "here"
    """Measured here, or predicted for another device: by a roofline, for mi100 by simulated shares of it."""
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


def latency(invocation: Invocation) -> None:
    given = invocation.settings(LatencyArguments)
    from depthfuse.benching.bench import randomised
    from depthfuse.cli.models import chosen_device, named_source, require_positive
    from depthfuse.config import LatencyConfig
    from depthfuse.costs import latency
    from depthfuse.errors import ConfigError
    from depthfuse.merging.model_inputs import input_size
    from depthfuse.merging.supernet import Supernet

    require_positive(batch=given.batch, rounds=given.rounds)
    if given.check and given.device != "here":
        raise ConfigError(f"--check measures here: it cannot check a prediction for {given.device}")
    model = randomised(named_source(given.model, given.model_kwargs).build())
    size = given.input_size or input_size(model)
    supernet = randomised(Supernet(model)).to(chosen_device(None))
    settings = LatencyConfig(
        batch_size=given.batch,
        dtype=given.dtype,
        rounds=given.rounds,
        backend=given.backend,
        device=given.device,
    )
    table = latency.make_latencies(supernet, size, settings, cache=given.out)
    tables.print_latencies(table, given.out)
    if given.check:
        checked = latency.check_prediction(supernet, size, settings, table, given.check)
        tables.print_check(checked, latency.relative_errors(checked))
