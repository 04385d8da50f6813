"""What a run's nets lose and gain in 8 bits: plain and merged, by each way of rounding, in OpenVINO and ONNX Runtime.

    python -m benchmarks.models.int8 runs/lite0 --label "EfficientNet-Lite0, Caltech-101"

Needs depthfuse[onnx,openvino,int8]. Each net is rounded by NNCF with ranges from 300 training images, the largest and
as NNCF takes them by default: symmetric and asymmetric activations, with bias correction and without, and after
equalising channels, where any may be. `--apart 4`
first scales such channels at random by up to 2^4 each way, which changes no output: what equalising is for. Scored are
the images for validation, all of them, in each runtime, beside the file in float. Files are timed in turn, each in a
process of its own. Rows go to benchmarks/results/int8.csv, in the place of earlier ones of the same net.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import importlib.metadata
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.running.conversion import Run, openvino
from depthfuse.benching.apart import time_apart
from depthfuse.benching.bench import machine, write_csv
from depthfuse.exporting import RUNTIMES
from depthfuse.exporting.equalising import equalised_subject, streams_of
from depthfuse.exporting.onnx_file import onnx_file
from depthfuse.exporting.programs import clean_program
from depthfuse.exporting.quantising import BY_DEFAULT, LARGEST, rounded
from depthfuse.exporting.subject import Subject, subject_of
from depthfuse.measuring.timing import quartiles
from depthfuse.runs.reopening import reopen
from depthfuse.runs.weights import load, load_strictly, read_tensors
from depthfuse.spec import SubnetSpec

NETS = ("plain", "merged")
RUN_IN = ("openvino", "onnx")
PRESETS = ("performance", "mixed")
# preset, ranges, bias correction, equalised
WAYS = (
    ("performance", LARGEST, True, False),
    ("performance", BY_DEFAULT, True, False),
    ("performance", LARGEST, False, False),
    ("performance", LARGEST, True, True),
    ("mixed", LARGEST, True, False),
)
SHARED = ("model", "net", "apart", "runtime")  # rows with the same are replaced


@dataclass(frozen=True)
class Way:
    """Of running a net. precision: float32, bfloat16 (of OpenVINO), or a preset of NNCF's."""

    runtime: str
    precision: str
    ranges: str = ""
    bias_correction: bool = False
    equalised: bool = False

    @property
    def is_timed(self) -> bool:
        """Ranges, bias correction and equalising change no operator."""
        usual = (self.ranges, self.bias_correction, self.equalised) == (LARGEST, True, False)
        return self.precision not in PRESETS or usual


def built(run: Path, net: str) -> nn.Module:
    if net == "merged":
        return load(run)
    model = SubnetSpec.load(run / "subnet.json").source.build()
    load_strictly(model, read_tensors(run / "baseline.safetensors"), run / "baseline.safetensors")
    return model.eval()


def apart(subject: Subject, by: int) -> Subject:
    """The same function with channels of very different size: each stream's scaled by random powers of two."""
    generator = torch.Generator().manual_seed(0)
    module = copy.deepcopy(subject.plan.module)
    for stream in streams_of(module):
        stream.divide(torch.randint(-by, by + 1, (stream.channels,), generator=generator).double())
    return replace(subject, plan=replace(subject.plan, module=module))


def files_of(subject: Subject, images: list[Tensor], runtime: str, folder: Path) -> dict[Way, Path]:
    """ONNX files of a net, in float and in 8 bits each way."""
    found: dict[Way, Path] = {}

    def put(way: Way, model: bytes) -> None:
        found[way] = folder / f"{len(found)}.onnx"
        found[way].write_bytes(model)
        print(f"written: {way}", flush=True)

    model = onnx_file(clean_program(subject, None), subject, "")
    equalised, streams = equalised_subject(subject)
    model_equalised = onnx_file(clean_program(equalised, None), equalised, "") if streams else None
    put(Way(runtime, "float32"), model)
    if runtime == "openvino":
        put(Way(runtime, "bfloat16"), model)
    for preset, ranges, correction, scaled in WAYS:
        given = model_equalised if scaled else model
        if given is not None:
            settings = {"preset": preset, "ranges": ranges, "bias_correction": correction}
            way = Way(runtime, preset, ranges, correction, scaled)
            put(way, rounded(given, images, uniform=RUNTIMES[runtime].uniform, **settings))
    return found


def run_of(path: Path, way: Way) -> Run:
    if way.precision == "bfloat16":
        return openvino(path, torch.get_num_threads(), "bf16")
    return RUNTIMES[way.runtime].run(path)


def loaded(model: nn.Module, x: Tensor, path: Path, way: Way) -> Callable[[Tensor], Tensor]:
    run = run_of(path, way)
    return lambda x: run(x)[0]


def answers(path: Path, way: Way, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[N] the class that a file gives each image."""
    run = run_of(path, way)
    return torch.cat([run(x)[0].argmax(1) for x, _ in batches])


def measured(
    files: dict[Way, Path],
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    batch_sizes: list[int],
    rounds: int,
    round_ms: float,
) -> list[dict[str, Any]]:
    targets = torch.cat([y for _, y in batches])
    given = {way: answers(path, way, batches) for way, path in files.items()}
    makes = {str(way): functools.partial(loaded, path=files[way], way=way) for way in files if way.is_timed}
    times = {}
    for batch in batch_sizes:
        x = batches[0][0][:batch]
        _, times[batch], _ = time_apart(makes, model, x, rounds, round_ms, {}, lambda name, outcome: True)
    rows = []
    for way, found in given.items():
        in_float = given[Way(way.runtime, "float32")]
        row = {
            **asdict(way),
            "top1": f"{100 * (found == targets).float().mean():.2f}",
            "agreement_with_float": f"{100 * (found == in_float).float().mean():.2f}",
            "mib": f"{files[way].stat().st_size / 2**20:.2f}",
        }
        for batch, timings in times.items():
            names = [f"batch{batch}_{name}" for name in ("ms", "q1_ms", "q3_ms", "speedup")]
            row |= dict.fromkeys(names, "")
            if way.is_timed:
                timing = timings[str(way)]
                low, middle, high = quartiles(timing.rounds_ms)
                speedup = timing.speedup_over(timings[str(Way(way.runtime, "float32"))])
                row |= dict(
                    zip(names, (*(f"{v:.3f}" for v in (middle, low, high)), f"{speedup:.2f}"), strict=True)
                )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--label", required=True, help="of the model and the data, for the table")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--runtimes", nargs="+", choices=RUN_IN, default=list(RUN_IN))
    parser.add_argument("--apart", type=int, default=0, help="scale channels by up to 2^this each way first")
    parser.add_argument("--calibration-images", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--round-ms", type=float, default=100.0, help="time for each file in each round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "int8.csv"
    data, _ = reopen(args.run)
    images = torch.cat([x for x, _ in data.calibration_loader(args.calibration_images)]).split(1)
    batches = list(data.val_loader())
    facts = {**machine(torch.device("cpu")), "nncf": importlib.metadata.version("nncf")}
    for net, runtime in itertools.product(args.nets, args.runtimes):
        model = built(args.run, net)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            subject = subject_of(model, torch.zeros_like(batches[0][0][:2]), None, "batch", on_cpu=True)
            if args.apart:
                subject = apart(subject, args.apart)
            files = files_of(subject, list(images), runtime, Path(folder))
            rows = measured(files, model, batches, args.batch, args.rounds, args.round_ms)
        known = dict(zip(SHARED, (args.label, net, str(args.apart), runtime), strict=True))
        for row in rows:
            print({**known, **row}, flush=True)
        write_csv(kept(path, known) + [{**known, **row, **facts} for row in rows], path, {})


def kept(path: Path, known: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of other nets."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if any(row[name] != known[name] for name in known)]


if __name__ == "__main__":
    main()
