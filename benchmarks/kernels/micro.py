"""Time every distinct operator of the networks against PyTorch, torch.compile and the vendor's fused call.

    python -m benchmarks.kernels.micro --networks resnet34 --batches 1 128 --dtypes fp16

Before an operator is timed its tests run, and before a case is timed every contender's result is compared with a
float32 one; where ours fails, no speed of that operator is printed and the exit status is 1. Contenders take turns,
on a GPU with a cold L2 cache (cold.py), and medians with quartiles go, as they come, into
benchmarks/results/micro_<device>_<dtype>_<versions>.csv, with a plot for each operator beside it. A run that was
stopped goes on where it was; after a change to the sources it starts anew.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels import cold
from benchmarks.kernels.cases import Case
from benchmarks.kernels.contenders import CONTENDERS, CPU_BUILDERS, Unavailable
from benchmarks.kernels.micro_report import Table, summary
from benchmarks.kernels.registry import NETWORKS, unique_cases
from depthfuse.measuring.roofline import peaks_of
from depthfuse.measuring.timing import Timing, time_interleaved

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OURS = "ours"
CPU_ROUND_MS = 20.0  # each contender in each round

# What is timed of a contender: on a GPU a graph of several copies of its call, on a CPU the call.
Run = cold.Captured | Callable[[], Tensor]


def select_cases(networks: list[str], batches: list[int], ops: list[str] | None) -> dict[Case, list[str]]:
    """Each distinct operator -> the layers that it serves, as "network:layer", operator by operator."""
    found: dict[Case, list[str]] = {}
    for network, batch in itertools.product(networks, batches):
        for case, layers in unique_cases(network, batch).items():
            if ops is None or case.op in ops:
                found.setdefault(case, []).extend(f"{network}:{layer}" for layer in layers)
    return dict(sorted(found.items(), key=lambda item: item[0].op))


def files_of_tests(op: str, device: torch.device) -> list[Path]:
    """The tests of what is timed: on a GPU of the kernel, on a CPU of the op and the fused modules."""
    folder = ROOT / "tests" / ("kernels" if device.type == "cuda" else "ops")
    stems = (op, op.removesuffix("_conv2d"), op.rpartition("_")[2])
    own = next((path for stem in stems if (path := folder / f"test_{stem}.py").exists()), None)
    if own is None:
        return []
    return [own] if device.type == "cuda" else [own, ROOT / "tests" / "test_nn.py"]


def passes_tests(op: str, device: torch.device) -> bool:
    """Run the op's tests in a process of their own; their output is shown where they fail."""
    files = files_of_tests(op, device)
    if not files:
        print(f"{op}: no test file found", flush=True)
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-x", *map(str, files)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # small tensors: threads would only wait for each other
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        print(result.stdout[-4000:] + result.stderr[-2000:], flush=True)
    return result.returncode == 0


def error_of(result: Tensor, reference: Tensor, case: Case) -> tuple[float, float]:
    """(relative error in root mean square, how much of it rounding explains); NaN and wrong shapes are inf.

    Rounding of operands and results to the dtype, twice over for those that operators of several layers hold in
    between, and of sums of `depth` products in float32.
    """
    if result.shape != reference.shape:
        return float("inf"), 0.0
    depth = case.flops() / 2 / max(1, reference.numel())
    allowed = 2 * torch.finfo(result.dtype).eps + 4 * max(1.0, depth) ** 0.5 * torch.finfo(torch.float32).eps
    difference = (result.double() - reference.double()).square().mean().sqrt()
    error = (difference / reference.double().square().mean().sqrt()).item()
    return (error if error == error else float("inf")), allowed


def prepare(
    case: Case, dtype: torch.dtype, device: torch.device, names: list[str]
) -> tuple[dict[str, Run], dict[str, float], list[str]]:
    """(what to time, error) by contender, and in words which contenders take no part and why.

    Raises:
        RuntimeError: ours fails or is wrong.
    """
    copies = 1
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        # a call of each contender holds an output, which is part of the elements moved
        copies = cold.copies_of(case.elements_moved() * dtype.itemsize * len(names), free_bytes)
    sets = [case.operands(dtype, str(device)) for _ in range(copies)]
    reference = case.eager(**{k: None if t is None else t.float() for k, t in sets[0].items()})
    runs: dict[str, Run] = {}
    errors, absent = {}, []
    for name in names:
        try:
            calls = CONTENDERS[name](case, sets)
            error, allowed = error_of(calls[0](), reference, case)
            if not error <= allowed:
                raise RuntimeError(f"relative error {error:.1e}, of which rounding explains {allowed:.1e}")
            runs[name] = cold.capture(calls) if device.type == "cuda" else calls[0]
            errors[name] = error
        except Unavailable as reason:
            absent.append(f"{name}: {reason}")
        except Exception as problem:  # whatever a library or compiler raises; of ours it is a failure
            if name == OURS:
                raise RuntimeError(f"{OURS} fails on {case.op} {case.shape()}: {problem}") from problem
            absent.append(f"{name} fails: {(str(problem) or repr(problem)).splitlines()[0]}")
    return runs, errors, absent


def rows_of(
    case: Case, layers: list[str], dtype: torch.dtype, device: torch.device, names: list[str], rounds: int
) -> list[dict]:
    """A row for each contender that takes part in this case; raises as `prepare` does."""
    with torch.inference_mode():
        runs, errors, absent = prepare(case, dtype, device, names)
        if device.type == "cuda":
            timings = cold.time_cold(runs, rounds)
        else:
            timings = time_interleaved(runs, rounds, CPU_ROUND_MS, device=device)
    peaks = peaks_of(device, dtype)
    bytes_moved = case.elements_moved() * dtype.itemsize
    least_us = 1e3 * peaks.least_ms(case.flops(), bytes_moved, case.matrix)
    mine = timings[OURS].rounds_ms
    rows = []
    for name, timing in timings.items():
        ratios = Timing(tuple(t / o for t, o in zip(timing.rounds_ms, mine, strict=True)))
        low, high = timing.quartiles_ms
        ratio_low, ratio_high = ratios.quartiles_ms
        rows.append(
            {
                "op": case.op,
                "shape": case.shape(),
                "dtype": str(dtype).removeprefix("torch."),
                "contender": name,
                "latency_us": round(timing.median_ms * 1e3, 3),
                "latency_q1_us": round(low * 1e3, 3),
                "latency_q3_us": round(high * 1e3, 3),
                "ratio_to_ours": round(ratios.median_ms, 3),
                "ratio_q1": round(ratio_low, 3),
                "ratio_q3": round(ratio_high, 3),
                "roofline_us": round(least_us, 3),
                "percent_of_roofline": round(100 * least_us / (timing.median_ms * 1e3), 1),
                "roofline": peaks.source,
                "relative_error": f"{errors[name]:.1e}",
                "rounds": rounds,
                "layers": len(layers),
                "first_layer": layers[0],
                "asked": " ".join(names),
                "absent": "; ".join(absent),
            }
        )
    return rows


def run(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    cases = select_cases(options.networks, options.batches, options.ops)
    if device.type == "cpu":
        cases = {case: layers for case, layers in cases.items() if case.op in CPU_BUILDERS}
    verdicts: dict[str, bool] = {}
    for dtype in options.dtypes:
        table = Table(options.out, device, dtype)
        machine = ", ".join(f"{name} {value}" for name, value in table.machine.items() if value)
        print(
            f"{machine}, {dtype}; % of the roofline from {peaks_of(device, DTYPES[dtype]).source}", flush=True
        )
        for case, layers in cases.items():
            if table.has(case, options.contenders):
                continue
            if case.op not in verdicts:
                verdicts[case.op] = passes_tests(case.op, device)
                if not verdicts[case.op]:
                    print(f"{case.op}: its tests fail, so no speed is measured", flush=True)
            if not verdicts[case.op]:
                continue
            try:
                rows = rows_of(case, layers, DTYPES[dtype], device, options.contenders, options.rounds)
            except RuntimeError as problem:
                verdicts[case.op] = False
                print(f"{problem}\n{case.op}: no more speeds are measured", flush=True)
                continue
            table.add(rows)
            print(summary(rows, OURS), flush=True)
        for path in table.plot():
            print(f"written: {path}", flush=True)
    failed = [op for op, passed in verdicts.items() if not passed]
    if failed:
        print(f"without a speed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ops", nargs="+", help="only these operators, such as conv2d")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 128] if on_gpu else [1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16"] if on_gpu else ["fp32"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    # Only where they are asked for: torch.compile on a CPU takes long, and native code that has run on no GPU yet may
    # take the process down with it.
    unusual = {"native"} if options.device.startswith("cuda") else {"native", "compile"}
    usual = [name for name in CONTENDERS if name not in unusual]
    options.contenders = options.contenders or usual
    if OURS not in options.contenders:
        options.contenders.insert(0, OURS)
    torch.backends.cudnn.benchmark = True  # the vendor's best algorithm
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for every contender
    torch.manual_seed(0)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
