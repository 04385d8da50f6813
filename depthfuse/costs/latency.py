"""The latency table: what merging each block saves on this machine, measured in its surroundings, as accelerated code.

A block timed by itself has its data in the cache and its launches to itself, so that the sums come out wrong. Here the
whole model is timed, with all blocks of one kind merged in one way, against the whole model as it is, A B A B; what it
saves is shared out evenly among these blocks.

Nothing else should run meanwhile. Where something did, it shows in the spread over the rounds: the variant is measured
again, longer, and what stays noisy is said. In the end the subnet of all best candidates is timed as a whole: no sum of
savings may promise more.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration import accelerate
from depthfuse.checkpoint import load_json, save_json
from depthfuse.config import DTYPES, LatencyConfig
from depthfuse.costs.prediction import predict_latencies, predicted_conditions
from depthfuse.costs.table import CostTable
from depthfuse.devices import device_name
from depthfuse.errors import CostError
from depthfuse.log import progress
from depthfuse.measuring.timing import quartiles, time_interleaved
from depthfuse.merging.supernet import Supernet
from depthfuse.merging.variants import kept_copy, merged_model, variants_of
from depthfuse.spec import KEEP, key_of
from depthfuse.untrusted import Positive

log = logging.getLogger(__name__)

Size = tuple[int, int, int]  # (C, H, W)
Checked = tuple[dict[str, str], float, float]  # choices, predicted ms, measured ms
IsNoise = Callable[[float, float], bool]  # of a median and its standard error

_ATTEMPTS = 3  # of a measurement that is noisy, each in twice the rounds of the one before
_WHOLE_WITHIN = (
    0.05  # standard error of the whole model's latency, relatively: only budgets in ms depend on it
)
_WHOLE_ROUNDS = 3  # times the rounds, for a subnet that was found: of several the luckiest may be taken
_SUMS_WITHIN = 0.1  # how far below its measured latency the sums may put the subnet of all best candidates


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

    Noisy savings are measured again, and a warning names those that stay so. For the floor see `bounded`.
    """
    config = config or LatencyConfig()
    conditions = conditions_of(supernet, input_size, config)
    table = None if cache is None else _read(cache, conditions)
    if table is not None and table.floor is not None and not table.lacking(supernet.options()):
        return table
    net = kept_copy(supernet)
    x = _images(net, input_size, config.batch_size)
    variants = variants_of(net, x)
    whole = _call(merged_model(net, {}), x, config)
    if table is None:
        table = CostTable(conditions, "ms", _whole_ms(whole, x, config), {path: {} for path in net.blocks})
    spread = {path: dict(table.spread.get(path, {})) for path in net.blocks}
    table = dataclasses.replace(table, floor=None, spread=spread)
    missing = [v for v in variants if any(v.candidate not in table.saved[path] for path in v.paths)]
    with progress("latency table", total=len(variants) + 1, done=len(variants) - len(missing)) as bar:
        for variant in missing:
            each_ms = table.whole / len(variant.paths)
            model = merged_model(net, variant.choices())
            ratio, error = _ratio(whole, model, x, config, _noise_in(table, each_ms))
            for path in variant.paths:
                table.saved[path][variant.candidate] = each_ms * (1 - ratio)
                table.spread[path][variant.candidate] = each_ms * error
            if cache is not None:
                table.save(cache)
            bar.advance()
        ratio, best = 1.0, table.best()
        if best:
            ratio, _ = _ratio(
                whole, merged_model(net, best), x, config, _noise_in(table, table.whole), "best"
            )
        table = bounded(table, table.whole * ratio)
        if cache is not None:
            table.save(cache)
        bar.advance()
    if noisy := table.noisy():
        log.warning(
            "%d of %d latencies are noisy, though measured %d times: %s%s. Stop what else runs here, delete the table, "
            "and measure again",
            len(noisy),
            sum(map(len, table.saved.values())),
            _ATTEMPTS,
            ", ".join(noisy[:3]),
            ", ..." if len(noisy) > 3 else "",
        )
    return table


def bounded(table: CostTable, floor_ms: float) -> CostTable:
    """The table with the latency of the subnet of all best candidates, measured as a whole, as its floor.

    Savings that sum up to more than that are scaled down until they do not, and a warning says so.
    """
    floor_ms = min(floor_ms, table.whole)  # what does not pay is not merged
    promised_ms = table.cost(table.best())
    saved = table.saved
    if promised_ms < (1 - _SUMS_WITHIN) * floor_ms:
        scale = (table.whole - floor_ms) / (table.whole - promised_ms)
        log.warning(
            "with all best merges the latencies sum up to %.4g ms, but %.4g ms of %.4g ms were measured: savings are "
            "scaled by %.2f. Was the machine busy?",
            promised_ms,
            floor_ms,
            table.whole,
            scale,
        )
        saved = {
            path: {name: scale * value if value > 0 else value for name, value in names.items()}
            for path, names in saved.items()
        }
    return dataclasses.replace(table, saved=saved, floor=floor_ms)


def _read(cache: Path, conditions: dict[str, Any]) -> CostTable | None:
    if not cache.exists():
        return None
    table = CostTable.load(cache)
    if table.conditions == conditions:
        return table
    log.info("the latency table %s was measured under other conditions: measuring again", cache)
    return None


def subnets_ms(
    supernet: Supernet, input_size: Size, config: LatencyConfig, table: CostTable, known: Path
) -> Callable[[dict[str, str]], float] | None:
    """{block path: candidate} -> latency of that subnet as a whole, in milliseconds: the table's whole, times the ratio
    of the two timed side by side.

    Args:
        known: JSON file of what was measured before under the table's conditions, and is not measured again.

    Returns None where the table is not of this machine and these settings.
    """
    if config.device != "here" or table.differing(conditions_of(supernet, input_size, config)):
        return None

    def measure_ms(choices: dict[str, str]) -> float:
        ratios: dict[str, float] = {}
        if known.exists():
            before = load_json(known, {"conditions": dict[str, Any], "ratios": dict[str, Positive]})
            ratios = before["ratios"] if before["conditions"] == table.conditions else {}
        key = key_of(choices)
        if key not in ratios:
            net = kept_copy(supernet)
            x = _images(net, input_size, config.batch_size)
            longer = dataclasses.replace(config, rounds=_WHOLE_ROUNDS * config.rounds)
            whole = _call(merged_model(net, {}), x, longer)
            subnet = merged_model(net, choices)
            ratios[key], _ = _ratio(whole, subnet, x, longer, _noise_in(table, table.whole))
            save_json(known, {"conditions": table.conditions, "ratios": ratios})
        return table.whole * ratios[key]

    return measure_ms


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
    is_noise = _noise_in(table, table.whole)
    checked = []
    with progress("check of the latency table", total=subnets) as bar:
        for choices in _draw(net, subnets, random.Random(seed)):
            ratio, _ = _ratio(whole, merged_model(net, choices), x, config, is_noise)
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
    dtype = DTYPES[config.dtype]
    fast = accelerate(
        model, x, dtype=dtype, backend=config.backend, verify=False, dynamic=False, engines="own"
    )
    return functools.partial(fast, x.to(DTYPES[config.dtype]))


def _noise_in(table: CostTable, each_ms: float) -> IsNoise:
    """For ratios to the whole: what they save, and their error, is `each_ms` times as much of one block."""
    return lambda ratio, error: table.is_noise(each_ms * (1 - ratio), each_ms * error)


def _whole_ms(whole: Callable[[], object], x: Tensor, config: LatencyConfig) -> float:
    def rounds_ms(rounds: int) -> Sequence[float]:
        return time_interleaved({"whole": whole}, rounds=rounds, device=x.device)["whole"].rounds_ms

    def is_noise(latency_ms: float, error_ms: float) -> bool:
        return error_ms > _WHOLE_WITHIN * latency_ms

    latency_ms, error_ms = _settled(rounds_ms, config.rounds, is_noise)
    if is_noise(latency_ms, error_ms):
        log.warning("the whole model's latency is noisy: %.4g ± %.2g ms", latency_ms, error_ms)
    return latency_ms


def _ratio(
    whole: Callable[[], object],
    model: nn.Module,
    x: Tensor,
    config: LatencyConfig,
    is_noise: IsNoise,
    name: str = "variant",
) -> tuple[float, float]:
    """Latency of `model` over that of the whole: the median over the rounds, and its standard error.

    The accelerated model is dropped on return: two are the most at once.
    """
    calls = {"whole": whole, name: _call(model, x, config)}

    def ratios(rounds: int) -> Sequence[float]:
        times = time_interleaved(calls, rounds=rounds, device=x.device)
        return times[name].ratios_to(times["whole"])

    return _settled(ratios, config.rounds, is_noise)


def _settled(
    measure: Callable[[int], Sequence[float]], rounds: int, is_noise: IsNoise
) -> tuple[float, float]:
    """Median of what `measure(rounds)` gives, and its standard error: measured again, longer, while that is noise."""
    values: list[float] = []
    for attempt in range(_ATTEMPTS):
        values += measure(rounds * 2**attempt)
        low, median, high = quartiles(values)
        # The quartiles of a normal distribution are 1.35 deviations apart, the median's error is 1.25 / sqrt(n) of one.
        error = 1.25 / 1.35 * (high - low) / math.sqrt(len(values))
        if not is_noise(median, error):
            break
    return median, error
