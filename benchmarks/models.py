"""Whole-model latency: `depthfuse.accelerate` against what its user would pick instead.

    python -m benchmarks.models --models resnet34 mobilenetv2_100 --batch 1 8 --dtype fp32

Every contender is verified against the eager model first. Then all are timed in turn, A B C A B C ..., and the ratios
are taken round by round: a shared machine's speed drifts, and the ratio of two runs made minutes apart means nothing.
Writes a CSV and a plot to benchmarks/results/. ONNX Runtime and OpenVINO take part where they are installed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import io
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import depthfuse  # noqa: F401  before timm, which needs its torchvision remedy

import timm  # isort: skip
from depthfuse.accelerate import accelerate
from depthfuse.accelerate.verify import TOLERANCE, relative_error
from depthfuse.env import collect

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = ("resnet34", "mobilenetv2_100", "mobilenetv2_140", "convnext_tiny", "deit_tiny_patch16_224")
OURS = "depthfuse"

Run = Callable[[Tensor], Tensor]


def eager(model: nn.Module, x: Tensor) -> Run:
    return model


def eager_channels_last(model: nn.Module, x: Tensor) -> Run:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def compiled(model: nn.Module, x: Tensor) -> Run:
    from torch._inductor import config

    torch._dynamo.reset()
    run = torch.compile(copy.deepcopy(model).to(memory_format=torch.channels_last))
    with config.patch(freezing=True), torch.no_grad():
        run(x.contiguous(memory_format=torch.channels_last))
    return run


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.onnx.export(model, (x,), buffer, dynamo=True, verbose=False)
    return buffer.getvalue()


def onnxruntime(model: nn.Module, x: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx(model, x), options, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {argument.name: x.numpy()})[0])


def openvino(model: nn.Module, x: Tensor) -> Run:
    import openvino

    core = openvino.Core()
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[x.dtype]
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    network = core.compile_model(core.read_model(_onnx(model, x)), "CPU", options)
    request = network.create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[network.output(0)])


def ours(model: nn.Module, x: Tensor) -> Run:
    return accelerate(model, x)


CONTENDERS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    OURS: ours,
    "eager": eager,
    "eager channels_last": eager_channels_last,
    "torch.compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
# torch.onnx.export gives static shapes and float32 inputs: these take part in float32 only.
FLOAT32_ONLY = {"onnxruntime", "openvino"}


def available(names: list[str], dtype: torch.dtype) -> list[str]:
    """Those of `names` that are installed and can run in `dtype`."""
    optional = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}
    return [
        name
        for name in names
        if all(importlib.util.find_spec(package) for package in optional.get(name, ()))
        and (dtype == torch.float32 or name not in FLOAT32_ONLY)
    ]


def random_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A timm model with random weights and, unlike a fresh one, batch norms that do something."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.25)
    return model.eval().to(device, dtype).requires_grad_(False)


def measure(runs: dict[str, Run], x: Tensor, rounds: int, round_ms: float) -> dict[str, list[float]]:
    """Latency in ms of each contender, one value a round; the contenders take turns within each round."""

    def timed(run: Run, calls: int) -> float:
        _synchronize(x)
        start = time.perf_counter()
        for _ in range(calls):
            run(x)
        _synchronize(x)
        return (time.perf_counter() - start) / calls * 1e3

    calls = {}
    for name, run in runs.items():
        timed(run, 3)
        calls[name] = max(1, round(round_ms / timed(run, 2)))
    latency_ms: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run(x)  # its threads and caches are cold after another's turn
            latency_ms[name].append(timed(run, calls[name]))
    return latency_ms


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def benchmark(name: str, batch: int, dtype: torch.dtype, device: str, args: argparse.Namespace) -> list[dict]:
    """One row for each contender on one model and batch size."""
    model = random_model(name, dtype, device)
    channels, height, width = model.pretrained_cfg["input_size"]
    x = torch.randn(batch, channels, height, width, dtype=dtype, device=device)
    with torch.no_grad():
        reference = model(x)
        runs, errors = {}, {}
        for contender in available(args.contenders, dtype):
            runs[contender] = CONTENDERS[contender](model, x)
            errors[contender] = relative_error(runs[contender](x), reference)
            if not errors[contender] <= TOLERANCE[dtype]:
                raise SystemExit(f"{contender} is wrong on {name}: relative error {errors[contender]:.1e}")
        latency_ms = measure(runs, x, args.rounds, args.round_ms)
    rows = []
    for contender, values in latency_ms.items():
        ratios = [theirs / mine for theirs, mine in zip(values, latency_ms[OURS], strict=True)]
        low, middle, high = quartiles(values)
        ratio_low, ratio, ratio_high = quartiles(ratios)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "contender": contender,
                "latency_ms": round(middle, 3),
                "latency_q1_ms": round(low, 3),
                "latency_q3_ms": round(high, 3),
                "ratio_to_depthfuse": round(ratio, 3),
                "ratio_q1": round(ratio_low, 3),
                "ratio_q3": round(ratio_high, 3),
                "max_relative_error": f"{errors[contender]:.1e}",
            }
        )
        print(
            f"{name:24} batch {batch:<3} {contender:20} {middle:9.3f} ms [{low:.3f}, {high:.3f}]   "
            f"{ratio:.2f}x depthfuse's time [{ratio_low:.2f}, {ratio_high:.2f}]",
            flush=True,
        )
    return rows


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Grouped bars: each contender's time over depthfuse's, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(1.6 * len(cases) + 3, 4.5), layout="constrained")
    width = 0.8 / len(contenders)
    for index, contender in enumerate(contenders):
        chosen = {(row["model"], row["batch"]): row for row in rows if row["contender"] == contender}
        present = [case for case in cases if case in chosen]
        ratios = [chosen[case]["ratio_to_depthfuse"] for case in present]
        spread = [
            [max(0.0, ratio - chosen[case]["ratio_q1"]) for case, ratio in zip(present, ratios, strict=True)],
            [max(0.0, chosen[case]["ratio_q3"] - ratio) for case, ratio in zip(present, ratios, strict=True)],
        ]
        places = [cases.index(case) + (index - len(contenders) / 2 + 0.5) * width for case in present]
        axes.bar(places, ratios, width, yerr=spread, label=contender, capsize=2)
    axes.set_xticks(range(len(cases)), [f"{model}\nbatch {batch}" for model, batch in cases], fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("time / depthfuse's time (higher is slower)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-ms", type=float, default=150.0, help="time for each contender in each round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if OURS not in args.contenders:
        args.contenders.insert(0, OURS)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch.onnx")
    facts = collect()
    gpu = facts["gpus"][0]["name"] if args.device.startswith("cuda") else ""
    device = gpu or f"{facts['cpu']['name']} {facts['cpu']['capability']}"
    threads = torch.get_num_threads()
    print(
        f"{device}, {threads} threads, torch {torch.__version__}, timm {timm.__version__}, input layout NCHW"
    )
    rows = []
    for name in args.models:
        for batch in args.batch:
            rows += benchmark(name, batch, DTYPES[args.dtype], args.device, args)
    machine = {"device": device, "threads": threads, "input_layout": "NCHW"}
    packages = ("torch", "timm", "triton", "onnxruntime", "openvino")
    machine |= {package: facts["versions"][package] or "" for package in packages}
    args.out.mkdir(parents=True, exist_ok=True)
    place = args.out / f"models_{args.device.partition(':')[0]}_{args.dtype}"
    with open(place.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
    plot(
        rows,
        place.with_suffix(".png"),
        f"{device}, {threads} threads, {args.dtype}, torch {torch.__version__}",
    )
    print(f"written: {place}.csv and .png")


if __name__ == "__main__":
    main()
