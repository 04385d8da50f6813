"""The tasks of a proof, and the process that does one: its rows go out one by one, as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

NETS = ("resnet34", "mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224")
WITH_COMPILE = "with torch.compile"
_ROUNDS, _ROUND_MS = 15, 40.0
# Falls short of what it should be: another is faster, or it is this far from the roofline.
_SHORT_RATIO, _SHORT_PERCENT = 1.05, 33.0

Row = tuple[str, str, dict[str, Any]]  # step, key, row


@dataclass(frozen=True)
class Task:
    """One process's work.

    least_s: with less time left than this it is not begun. limit_s: after this it is stopped; what it has found counts.
    fallback: what is done instead where it fails.
    """

    step: str
    args: tuple[str, ...]
    least_s: float
    limit_s: float
    fallback: Task | None = None

    @property
    def name(self) -> str:
        return " ".join((self.step, *self.args))


def tasks(rehearse: bool) -> Iterator[Task]:
    """All of them, the most worth knowing first."""
    from depthfuse.selftest.cases import OPS

    for op in OPS:
        yield Task("self-test", (op,), 10, 120)
    for stage in ("models", "models, tuned"):
        if stage == "models, tuned":
            for net in NETS if not rehearse else ("small",):
                for batch in batches(rehearse):
                    yield Task("operators", (net, str(batch)), 20, 300)
            yield Task("tuning", (), 30, 900)
        for variant in ("plain", "merged"):
            for batch in batches(rehearse):
                for net in NETS if not rehearse else ("small",):
                    args = (net, variant, str(batch))
                    alone = Task(stage, args, 20, 120)
                    yield alone if rehearse else Task(stage, (*args, WITH_COMPILE), 60, 300, alone)


def batches(rehearse: bool) -> tuple[int, int]:
    return (1, 3) if rehearse else (1, 128)


def do(task: list[str], rehearse: bool, known: list[dict[str, Any]]) -> Iterator[Row]:
    """The rows of one task, given by step and arguments. known: the rows of "operators", for the tuning."""
    step, *args = task
    device = torch.device("cpu" if rehearse else "cuda")
    dtype = torch.float32 if rehearse else torch.float16
    torch.manual_seed(0)
    if step == "self-test":
        yield from _self_test(args[0], device)
    elif step in ("models", "models, tuned"):
        yield from _model(step, args, device, dtype, rehearse)
    elif step == "operators":
        yield from _operators(args[0], int(args[1]), device, dtype, rehearse)
    elif step == "tuning" and not rehearse:
        yield from _tuning(known, dtype)


def _self_test(op: str, device: torch.device) -> Iterator[Row]:
    from depthfuse.selftest.run import self_test

    for check in self_test(device, [op]):
        yield "self-test", f"{op}, {check.case}, {check.dtype}", asdict(check)


def _model(
    step: str, args: list[str], device: torch.device, dtype: torch.dtype, rehearse: bool
) -> Iterator[Row]:
    from benchmarks.models.__main__ import build, merged_half
    from depthfuse import ModelSource
    from depthfuse.benching.bench import compare, randomised
    from depthfuse.merging.model_inputs import input_size

    net, variant, batch, *others = args
    contenders = ["eager", "eager channels_last", "eager replayed", *(["torch.compile"] if others else [])]
    if rehearse:
        small = {"channels": (8, 12, 16, 24), "num_classes": 7}
        model = randomised(ModelSource.make("resnet18", **small).build())
        model = model if variant == "plain" else merged_half(model)
        size: tuple[int, ...] = (3, 33, 33)
    else:
        model = build(net, variant)
        size = input_size(model)
    model = model.to(device, dtype)
    x = torch.randn(int(batch), *size, device=device).to(dtype)
    label = net if variant == "plain" else f"{net} + merged"
    rounds, round_ms = (3, 5.0) if rehearse else (_ROUNDS, _ROUND_MS)
    for row in compare(model, label, x, contenders, rounds, round_ms):
        if row["contender"] == "depthfuse" and device.type == "cuda":
            row = row | {"launches": launches_of(model, x)}
        yield step, f"{label}, {batch}, {row['contender']}", row


def launches_of(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Kernels that one call of the accelerated model runs, counted by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    import depthfuse

    fast = depthfuse.accelerate(model, x)
    fast(x)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        fast(x)
        torch.cuda.synchronize()
    kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)


def _operators(
    net: str, batch: int, device: torch.device, dtype: torch.dtype, rehearse: bool
) -> Iterator[Row]:
    from benchmarks.kernels.cases import Conv2dCase, LinearCase
    from benchmarks.kernels.micro import rows_of
    from benchmarks.kernels.registry import unique_cases

    if rehearse:
        cases: dict[Any, list[str]] = {
            LinearCase(batch * 5, 16, 24, "gelu", False, True): ["rehearsed"],
            Conv2dCase(batch, 8, 7, 8, 3, 1, 1, "relu", True): ["rehearsed"],
        }
    else:
        cases = unique_cases(net, batch)
    for case, layers in cases.items():
        for row in rows_of(case, layers, dtype, device, ["ours", "eager", "vendor"], 3 if rehearse else 9):
            yield "operators", f"{case.op}, {case.shape()}, {row['contender']}", row | {"network": net}


def short(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(op, shape) of what falls short, the worst first."""
    best: dict[tuple[str, str], float] = {}
    percent: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["op"], row["shape"]
        if row["contender"] == "ours":
            percent[key] = row["percent_of_roofline"]
        else:
            best[key] = min(best.get(key, float("inf")), row["ratio_to_ours"])
    found = [key for key in percent if best.get(key, 9.0) < _SHORT_RATIO or percent[key] < _SHORT_PERCENT]
    return sorted(found, key=lambda key: best.get(key, 9.0))


def _tuning(known: list[dict[str, Any]], dtype: torch.dtype) -> Iterator[Row]:
    from benchmarks.kernels.registry import unique_cases
    from benchmarks.kernels.tune import call_of
    from depthfuse.kernels.tuning.measure import tune

    name = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    cases = {
        (case.op, case.shape()): case
        for net in NETS
        for batch in batches(rehearse=False)
        for case in unique_cases(net, batch)
    }
    for key in short(known):
        if key in cases:
            with torch.inference_mode():
                found = tune(call_of(cases[key], name))
            for request, entry in found.items():
                yield "tuning", request.key(), {"request": request.key(), "entry": asdict(entry)}


def main() -> None:
    """The process of one task: its arguments are one JSON list, the rows that it needs come in on standard input."""
    task, rehearse = json.loads(sys.argv[1])
    known = json.loads(sys.stdin.read() or "[]")
    parent = os.getppid()
    for row in do(task, rehearse, known):
        if os.getppid() != parent:
            sys.exit("whoever wanted this is gone")
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
