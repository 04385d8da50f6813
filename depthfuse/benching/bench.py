"""Whole-model latency: `depthfuse.accelerate` against what its user would pick instead.

Every contender is verified against the eager model first. Then all are timed in turn, A B C A B C ..., and the ratios
are taken round by round: a shared machine's speed drifts, and the ratio of two runs made minutes apart means nothing.
"""

from __future__ import annotations

import csv
import functools
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from depthfuse.acceleration import Report, accelerate
from depthfuse.benching.apart import BUSY, CONVOLUTIONS, Make, time_apart
from depthfuse.benching.engines import ENGINES, OURS, Call, available
from depthfuse.env import collect
from depthfuse.measuring.accuracy import TOLERANCE, relative_error
from depthfuse.measuring.timing import Timing, quartiles, time_interleaved
from depthfuse.reporting.figures import HEIGHT, WIDTH, Figure, legend_below, short
from depthfuse.reporting.style import light, series

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def randomised(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, in place, with weights that do something, unlike fresh ones; seeded.

    timm starts the last norm of a residual branch, LayerScale and other gains at zero or close to it: a mistake behind
    them would not show in the output.
    """
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.25)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 or not parameter.is_floating_point():
                continue
            if name == "bias":
                nn.init.normal_(parameter, 0, 0.1)
            elif parameter.abs().max() < 1e-2 or isinstance(module, _BatchNorm | nn.LayerNorm):
                nn.init.uniform_(parameter, 0.5, 1.0)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def compare(
    model: nn.Module,
    label: str,
    x: Tensor,
    contenders: Sequence[str] = tuple(ENGINES),
    rounds: int = 15,
    round_ms: float = 150.0,
    backend: str = "auto",
    busy_processes: int = 0,
    beside_convolutions: bool = False,
) -> list[Row]:
    """Time the contenders on one model and input: one row each, ours first, with no engine but our own.

    On a CPU each has a process of its own, which gets the model by pickling: a script that calls this needs the usual
    `if __name__ == "__main__":`. Those that are not installed or do not run in this dtype are left out; those that fail
    on this model, or compute something else, too, with a warning.

    Args:
        model: in evaluation mode, of x's dtype and device. x: [N, C, H, W].
        contenders: names in `ENGINES`; ours takes part in any case.
        rounds: interleaved. round_ms: time for each contender in each round.
        backend: of ours, see `depthfuse.ops.resolve_backend`.
        busy_processes: on a CPU, beside how many busy processes single calls are timed, too. beside_convolutions: also
            beside a process that runs PyTorch's convolutions on two threads.

    Raises RuntimeError where ours fails.
    """
    others = [name for name in contenders if name != OURS]
    makes: dict[str, Make] = {OURS: functools.partial(_ours, backend=backend)}
    makes |= {name: ENGINES[name].make for name in available(others, x.dtype, x.device)}

    def takes_part(name: str, outcome: float | str) -> bool:
        if isinstance(outcome, str):
            if name == OURS:
                raise RuntimeError(f"depthfuse does not run {label}: {outcome}")
            logger.warning("%s does not run %s: %s", name, label, outcome)
            return False
        if not outcome <= TOLERANCE[x.dtype]:
            logger.warning("%s is wrong on %s: relative error %.1e; it is left out", name, label, outcome)
            return False
        return True

    neighbours = {BUSY: busy_processes, CONVOLUTIONS: int(beside_convolutions)}
    neighbours = {name: processes for name, processes in neighbours.items() if processes}
    if x.device.type == "cpu":
        errors, timings, loaded = time_apart(makes, model, x, rounds, round_ms, neighbours, takes_part)
    else:
        errors, timings = _time_here(makes, model, x, rounds, round_ms, takes_part)
        loaded = {}
    return [
        _row(label, x, name, timing, timings[OURS], errors[name])
        | {
            f"{neighbour}_latency_ms": round(statistics.median(calls_ms[name]), 3)
            for neighbour, calls_ms in loaded.items()
        }
        for name, timing in timings.items()
    ]


def _ours(model: nn.Module, x: Tensor, backend: str) -> Call:
    return accelerate(model, x, backend=backend, engines="own")


def _time_here(
    makes: dict[str, Make],
    model: nn.Module,
    x: Tensor,
    rounds: int,
    round_ms: float,
    takes_part: Callable[[str, float | str], bool],
) -> tuple[dict[str, float], dict[str, Timing]]:
    """In this process, as on a GPU, where nobody's threads are in the way and each process would start CUDA anew."""
    reference, errors, calls = model(x), {}, {}
    for name, make in makes.items():
        outcome: float | str
        try:
            run = make(model, x)
            outcome = relative_error(run(x), reference)
        except Exception as failure:  # whatever another project's compiler raises
            outcome = (str(failure) or repr(failure)).splitlines()[0]
        if takes_part(name, outcome):
            errors[name], calls[name] = outcome, functools.partial(run, x)
    return errors, time_interleaved(calls, rounds, round_ms, device=x.device)


def _row(label: str, x: Tensor, name: str, timing: Timing, ours: Timing, error: float) -> Row:
    low, middle, high = quartiles(timing.rounds_ms)
    ratio_low, ratio, ratio_high = quartiles(timing.ratios_to(ours))
    return {
        "model": label,
        "batch": x.shape[0],
        "dtype": str(x.dtype).removeprefix("torch."),
        "contender": name,
        "latency_ms": round(middle, 3),
        "latency_q1_ms": round(low, 3),
        "latency_q3_ms": round(high, 3),
        "ratio_to_depthfuse": round(ratio, 3),
        "ratio_q1": round(ratio_low, 3),
        "ratio_q3": round(ratio_high, 3),
        "max_relative_error": f"{error:.1e}",
    }


def operations(model: nn.Module, x: Tensor, backend: str = "auto") -> Report:
    """What each operation of `model`, accelerated for x, costs: latency before and after, MACs, roofline."""
    return accelerate(model, x, backend=backend, engines="own").profile(x, model=model)


def machine(device: torch.device) -> dict[str, Any]:
    """What every figure is quoted with: device, threads, versions."""
    facts = collect()
    name = f"{facts['cpu']['name']} {facts['cpu']['capability']}"
    if device.type == "cuda":
        name = facts["gpus"][device.index or 0]["name"]
    packages = ("torch", "timm", "triton", "onnxruntime", "openvino", "executorch", "zentorch")
    return {"device": name, "threads": torch.get_num_threads(), "input_layout": "NCHW"} | {
        package: facts["versions"][package] or "" for package in packages
    }


def write_csv(rows: Sequence[Row], path: Path, machine: dict[str, Any]) -> None:
    """Rows, with the machine's facts on each; empty where a row lacks what others have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(name for row in (*rows, machine) for name in row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns), restval="")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def table_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Contenders side by side as cells, first row its head."""
    head = ["batch", "contender", "median ms", "quartiles ms", "time / ours", "quartiles", "error"]
    busy = any("busy_latency_ms" in row for row in rows)
    cells = [
        [
            str(row["batch"]),
            row["contender"],
            f"{row['latency_ms']:.3f}",
            f"{row['latency_q1_ms']:.3f} to {row['latency_q3_ms']:.3f}",
            f"{row['ratio_to_depthfuse']:.2f}",
            f"{row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}",
            row["max_relative_error"],
            *([f"{row['busy_latency_ms']:.3f}"] if "busy_latency_ms" in row else []),
        ]
        for row in rows
    ]
    return [[*head, *(["ms beside busy processes"] if busy else [])], *cells]


_LETTERS = 9  # of a title, an inch


def ratios(rows: Sequence[Row], title: str) -> Figure:
    """Grouped bars: each contender's time over ours, with quartiles."""
    cases = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    alone = len({model for model, _ in cases}) == 1

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.grid(False, axis="x")
        width = 0.8 / len(contenders)
        for index, contender in enumerate(contenders):
            chosen = {(row["model"], row["batch"]): row for row in rows if row["contender"] == contender}
            present = [case for case in cases if case in chosen]
            heights = [chosen[case]["ratio_to_depthfuse"] for case in present]
            spread = [
                [
                    max(0.0, height - chosen[case]["ratio_q1"])
                    for case, height in zip(present, heights, strict=True)
                ],
                [
                    max(0.0, chosen[case]["ratio_q3"] - height)
                    for case, height in zip(present, heights, strict=True)
                ],
            ]
            places = [cases.index(case) + (index - len(contenders) / 2 + 0.5) * width for case in present]
            looks = {
                "label": short(contender, 28),
                "color": series(index),
                "capsize": 2,
                "ecolor": light("muted"),
            }
            axes.bar(places, heights, 0.9 * width, yerr=spread, **looks)
        names = [
            f"batch {batch}"
            if alone
            else "\n".join([*(short(part, 16) for part in model.split(" + ")), f"batch {batch}"])
            for model, batch in cases
        ]
        axes.set_xticks(range(len(cases)), names, fontsize=8)
        axes.axhline(1.0, color=light("ink"), linewidth=0.8)
        axes.set_ylabel("time / depthfuse's time (higher is slower)")
        axes.set_title(short(title, int(_LETTERS * figure.get_size_inches()[0])))
        legend_below(axes, columns=2, lines=1 if alone else 3)

    words = "The time of each engine over depthfuse's, median and quartiles; above 1 is slower."
    return Figure("Time beside depthfuse's", words, draw, max(WIDTH, 1.1 * len(cases) + 2), HEIGHT + 0.4)
