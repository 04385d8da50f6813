"""The latency table: what merging each block saves on this machine, measured in its surroundings, as accelerated code.

A block timed by itself has its data in the cache and its launches to itself, so that the sums come out wrong. Here the
whole model is timed, with all blocks of one kind merged in one way, against the whole model as it is, A B A B; what it
saves is shared out evenly among these blocks.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration import accelerate
from depthfuse.config import DTYPES, LatencyConfig
from depthfuse.costs.prediction import predict_latencies, predicted_conditions
from depthfuse.costs.table import CostTable
from depthfuse.devices import device_name
from depthfuse.errors import CostError
from depthfuse.log import progress
from depthfuse.measuring.timing import time_interleaved
from depthfuse.merging.supernet import Supernet
from depthfuse.merging.variants import kept_copy, merged_model, variants_of
from depthfuse.spec import KEEP

log = logging.getLogger(__name__)

Size = tuple[int, int, int]  # (C, H, W)
Checked = tuple[dict[str, str], float, float]  # choices, predicted ms, measured ms


def make_latencies(
    supernet: Supernet, input_size: Size, config: LatencyConfig, cache: Path | None = None
) -> CostTable:
    """Measured here, or predicted where `config.device` is another machine; written to `cache`."""
    if config.device == "here":
        return measure_latencies(supernet, input_size, config, cache)
    table = predict_latencies(supernet, input_size, config.device, DTYPES[config.dtype], config.batch_size)
    if cache is not None:
        table.save(cache)
    return table


def conditions_of(supernet: Supernet, input_size: Size, config: LatencyConfig) -> dict[str, Any]:
    """What the numbers of `make_latencies` hold for."""
    dtype = DTYPES[config.dtype]
    if config.device != "here":
        return predicted_conditions(supernet.source, input_size, config.device, dtype, config.batch_size)
    device = next(supernet.parameters()).device
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": config.batch_size,
        "input_size": list(input_size),
        "backend": config.backend,
        "torch": torch.__version__,
        "model": supernet.source.name,
        "model_kwargs": json.loads(json.dumps(supernet.source.kwargs)),
        "predicted": False,
    }


def measure_latencies(
    supernet: Supernet, input_size: Size, config: LatencyConfig | None = None, cache: Path | None = None
) -> CostTable:
    """Measure what each candidate of each block saves, in milliseconds.

    Args:
        input_size: (C, H, W).
        cache: where the table is written after each variant. One that stands there and was measured under the same
            conditions is taken over; where it was cut short, what it lacks is measured.
    """
    config = config or LatencyConfig()
    conditions = conditions_of(supernet, input_size, config)
    table = None if cache is None else _read(cache, conditions)
    if table is not None and not table.lacking(supernet.options()):
        return table
    net = kept_copy(supernet)
    x = _images(net, input_size, config.batch_size)
    variants = variants_of(net, x)
    whole = _call(merged_model(net, {}), x, config)
    if table is None:
        whole_ms = time_interleaved({"whole": whole}, rounds=config.rounds, device=x.device)[
            "whole"
        ].median_ms
        table = CostTable(conditions, "ms", whole_ms, {path: {} for path in net.blocks})
    missing = [v for v in variants if any(v.candidate not in table.saved[path] for path in v.paths)]
    with progress("latency table", total=len(variants), done=len(variants) - len(missing)) as bar:
        for variant in missing:
            ratio = _ratio(whole, merged_model(net, variant.choices()), x, config)
            for path in variant.paths:
                table.saved[path][variant.candidate] = table.whole * (1 - ratio) / len(variant.paths)
            if cache is not None:
                table.save(cache)
            bar.advance()
    return table


def _read(cache: Path, conditions: dict[str, Any]) -> CostTable | None:
    if not cache.exists():
        return None
    table = CostTable.load(cache)
    if table.conditions == conditions:
        return table
    log.info("the latency table %s was measured under other conditions: measuring again", cache)
    return None


def check_prediction(
    supernet: Supernet,
    input_size: Size,
    config: LatencyConfig,
    table: CostTable,
    subnets: int = 8,
    seed: int = 0,
) -> list[Checked]:
    """How well the table's sums hold: [(choices, predicted ms, measured ms)] of random subnets, timed as wholes.

    Raises CostError for a table that was not measured on this machine with these settings.
    """
    if table.conditions.get("predicted"):
        raise CostError(
            "a predicted table can only be checked on its own device: measure one there and compare"
        )
    table.check_conditions(conditions_of(supernet, input_size, config), "to be checked")
    net = kept_copy(supernet)
    x = _images(net, input_size, config.batch_size)
    whole = _call(merged_model(net, {}), x, config)
    checked = []
    with progress("check of the latency table", total=subnets) as bar:
        for choices in _draw(net, subnets, random.Random(seed)):
            ratio = _ratio(whole, merged_model(net, choices), x, config)
            checked.append((choices, table.cost(choices), table.whole * ratio))
            bar.advance()
    return checked


def _draw(net: Supernet, count: int, rng: random.Random) -> list[dict[str, str]]:
    """Different subnets, none of them the whole; fewer where there are no more."""
    drawn: dict[tuple, dict[str, str]] = {}
    for _ in range(20 * count):
        choices = {path: name for path, name in net.sample(rng).items() if name != KEEP}
        if choices and len(drawn) < count:
            drawn.setdefault(tuple(choices.items()), choices)
    return list(drawn.values())


def relative_errors(checked: Sequence[Checked]) -> list[float]:
    """|predicted - measured| / measured of each subnet of `check_prediction`."""
    return [abs(predicted - measured) / measured for _, predicted, measured in checked]


def _images(net: Supernet, input_size: Size, batch_size: int) -> Tensor:
    like = next(net.parameters())
    return torch.randn(batch_size, *input_size, device=like.device, dtype=like.dtype)


def _call(model: nn.Module, x: Tensor, config: LatencyConfig) -> Callable[[], object]:
    # Not verified: the weights may be untrained, and overflow. Verified is what is accelerated in the end.
    fast = accelerate(model, x, dtype=DTYPES[config.dtype], backend=config.backend, verify=False)
    return functools.partial(fast, x.to(DTYPES[config.dtype]))


def _ratio(whole: Callable[[], object], model: nn.Module, x: Tensor, config: LatencyConfig) -> float:
    """Median over the rounds of model / whole. The accelerated model is dropped on return: two are the most at once."""
    calls = {"whole": whole, "variant": _call(model, x, config)}
    times = time_interleaved(calls, rounds=config.rounds, device=x.device)
    return statistics.median(times["variant"].ratios_to(times["whole"]))
