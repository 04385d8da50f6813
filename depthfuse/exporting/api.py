"""`export`: a model as a file for the runtime that it is deployed with."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.running.conversion import Run
from depthfuse.checkpoint import sync_folder, temporary_beside
from depthfuse.data import DataBundle
from depthfuse.errors import ExportError
from depthfuse.exporting.calibration import LEAST_IMAGES, Samples, samples_of
from depthfuse.exporting.checking import Comparison, compare, other_calls
from depthfuse.exporting.equalising import equalised_subject
from depthfuse.exporting.facts import facts_of, feeding_of
from depthfuse.exporting.onnx_file import onnx_file, with_facts
from depthfuse.exporting.programs import clean_program, reason_of
from depthfuse.exporting.quantising import PACKAGES, Quantisation, quantise
from depthfuse.exporting.runtimes import RUNTIMES, Runtime, absent
from depthfuse.exporting.subject import DYNAMIC, NONE, Subject, loaded, subject_of
from depthfuse.merging.tracing import one_at_a_time
from depthfuse.runs.feeding import load_feeding
from depthfuse.runs.reopening import reopen
from depthfuse.tasks import Task
from depthfuse.untrusted import is_out_of_memory

logger = logging.getLogger(__name__)

FLOAT, INT8 = PRECISIONS = ("float", "int8")


@dataclass(frozen=True)
class ExportedFile:
    """What `export` wrote.

    path: the file. files: all of them, `path` first. runtime: a name in `RUNTIMES`. facts: what the file says about the
    model. operations: {operator of PyTorch's: how often} in the exported program. comparison: with the model, None
    where nothing was compared; of a file in 8 bits, of the same in float. quantisation: how 8 bits were made, and what
    they lost.
    """

    path: Path
    files: tuple[Path, ...]
    runtime: str
    facts: dict[str, Any]
    operations: dict[str, int]
    comparison: Comparison | None
    quantisation: Quantisation | None = None

    def __str__(self) -> str:
        size_mib = sum(file.stat().st_size for file in self.files) / 2**20
        names = " and ".join(str(file) for file in self.files)
        shapes = ", ".join(
            f"{each['name']} {each['dtype']}[{', '.join(map(str, each['shape']))}]"
            for each in self.facts["inputs"]
        )
        checked = "not compared with the model"
        if self.comparison is not None:
            runs = " and ".join(str(list(shape)) for shape in self.comparison.shapes)
            checked = (
                f"off from the model in float64 by {self.comparison.error:.1e} of the largest output on {runs} "
                f"({self.comparison.allowed:.1e} allowed)"
            )
        if self.quantisation is not None:
            checked = f"{self.quantisation}; in float {checked}"
        title = RUNTIMES[self.runtime].title
        return f"{names} ({size_mib:.1f} MiB) for {title}: {shapes} -> {', '.join(self.facts['outputs'])}; {checked}"


def export(
    model: nn.Module | str | Path,
    x: Tensor | tuple[Any, ...] | None,
    path: str | Path,
    to: str,
    *,
    example_kwargs: dict[str, Any] | None = None,
    dynamic: str = "batch",
    largest_batch: int | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    check: bool = True,
    precision: str = FLOAT,
    calibration: DataBundle | Tensor | Iterable[Any] | None = None,
    calibration_images: int = 300,
    points: float | None = None,
    task: Task | None = None,
    equalise: bool = False,
) -> ExportedFile:
    """Write a model for another runtime, and compare what the file computes there with the model.

    The model becomes one graph in which batch norms, LayerScale and sums of convolutions are folded: one convolution or
    linear layer an operator. The file holds the weights, and facts about the model as JSON by the name "depthfuse":
    its inputs and outputs, classes, mean and std, where it comes from (spec), and versions.

    Args:
        model: in evaluation mode: merged, or any other that `depthfuse.accelerate` captures as a whole; what that
            gives, in the place of which the model that it was made from is exported; the folder of a run, or a file
            that `AcceleratedModel.save` wrote. It is left alone.
        x: the arguments of an example call by position, or the one tensor that the model takes. None: noise of the
            model's own input size. Where the batch is open, an example of one image is doubled.
        path: the file to write; its ending is the runtime's. OpenVINO's weights lie beside it, as .bin.
        to: "onnx" (ONNX Runtime; opset 18), "openvino" (.xml), "torch" (torch.export, .pt2), "aoti" (AOTInductor, .pt2:
            compiled for the device that the model is on), "executorch" (on XNNPACK, .pte), "tensorrt" or "migraphx"
            (the .onnx that these read: its operators are compared with their lists, its values in ONNX Runtime).
        example_kwargs: the arguments of the example call by name.
        dynamic: which sizes of the inputs are left open: "batch" the first axis of all that have as many images as the
            first input; "sizes" also height and width; "none": none.
        largest_batch: that an open batch reaches. ExecuTorch lays memory out for it, and takes 64 by default; None for
            the others is any.
        classes, mean, std: names of the outputs, and what images are normalised by (white is 1), for the facts. By
            default what the run, or timm, says of the model.
        check: compare the file, run in its runtime, with the model in float64: on other values, with one image more and
            with a single one. False writes it unseen.
        precision: "float", the model's own, or "int8", for "onnx" and "openvino": weights and activations in 8 bits,
            as far as the budget allows. The file's score is measured in the runtime, and layers that it suffers from
            stay in float until it is good enough. The comparison above is then of the same file in float.
        calibration: for "int8", images as the model takes them, float32 and normalised: [N, C, H, W], batches of such
            or of (images, targets), or a bundle. None: the data of the run. Of a bundle, training images give the
            ranges of values, and those held out the score; of anything else the first images, and those behind them.
        calibration_images: how many give the ranges.
        points: how much of the score may be lost, in points; 0.5 where there are targets, 5 in agreement with the model
            itself where there are none: a changed answer may as well be a corrected one.
        task: what scores, with targets. Default: the run's, or classification.
        equalise: scale channels between layers first, see `depthfuse.exporting.equalising`.

    Returns:
        An ExportedFile; `print` tells what was written and how far it is off.

    Raises:
        ExportError: a package is missing (the message names what to install), the model is in training mode, does not
            become one graph, fixes a size that is to be open, or has an operator that the runtime does not know; the
            file does not run, differs, loses more than `points`, or cannot be written; images that cannot be calibrated
            by. No file is left, and an earlier one stays as it was.
        ValueError: an unknown runtime, `dynamic` or `precision`, a path with another ending, a runtime that takes no 8
            bits from here, or settings of "int8" for another precision.
        CheckpointError, SpecError: a run or a file that cannot be read. DataError: a run's data that is not there.
    """
    path = Path(path)
    runtime = _runtime(to, path, dynamic, largest_batch)
    _check_precision(precision, to, calibration_images, points, (calibration, points, task, equalise or None))
    runtime.require(check)
    if precision == INT8 and absent(*PACKAGES):
        raise ExportError(
            f'int8 needs {" and ".join(absent(*PACKAGES))}: pip install "depthfuse[{runtime.extra},int8]"'
        )
    net = model if isinstance(model, nn.Module) else loaded(model)
    told = None if isinstance(model, nn.Module) else load_feeding(Path(model))
    if x is None and example_kwargs is None and told is not None:
        x = torch.randn(1, *told["input_size"], generator=torch.Generator().manual_seed(0))
    largest = runtime.largest_batch if largest_batch is None else largest_batch
    with one_at_a_time, torch.no_grad():
        subject = subject_of(net, x, example_kwargs, dynamic, runtime.on_cpu)
        _check_batch(subject, largest)
        calls = other_calls(subject, largest)
        facts = facts_of(subject, told or feeding_of(subject.model), classes, mean, std)
        samples = None
        if precision == INT8:
            if calibration is None and not isinstance(model, nn.Module) and Path(model).is_dir():
                calibration, scored_by = reopen(Path(model))
                task = task or scored_by
            samples = samples_of(calibration, subject, calibration_images, points, task)
        equalised = 0
        if equalise:
            subject, equalised = equalised_subject(subject)
        program = clean_program(subject, largest)
        operations = _operations_of(program)
        try:
            written = _write(
                runtime, subject, program, facts, path, calls if check else (), samples, equalised
            )
        except OSError as error:
            raise ExportError(
                f"cannot write {path}: {error.strerror or error}. What stood there before is untouched"
            ) from error
    return ExportedFile(
        path, written.files, to, written.facts, operations, written.comparison, written.quantisation
    )


def _runtime(to: str, path: Path, dynamic: str, largest_batch: int | None) -> Runtime:
    """Raises ValueError for settings that make no sense."""
    if to not in RUNTIMES:
        raise ValueError(f"to is {to!r}, expected one of {', '.join(map(repr, RUNTIMES))}")
    runtime = RUNTIMES[to]
    if path.suffix != runtime.suffix:
        raise ValueError(
            f"{path} does not end in {runtime.suffix}, which {runtime.title} expects of its files"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file to write")
    if dynamic not in DYNAMIC:
        raise ValueError(f"dynamic is {dynamic!r}, expected one of {', '.join(map(repr, DYNAMIC))}")
    if largest_batch is not None and largest_batch < 2:
        raise ValueError(
            f"largest_batch is {largest_batch}, expected 2 or more; dynamic='none' fixes the batch"
        )
    return runtime


def _check_precision(
    precision: str, to: str, images: int, points: float | None, others: Sequence[Any]
) -> None:
    """Raises ValueError for settings that make no sense.

    others: settings of 8 bits alone, None where they are not given.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(map(repr, PRECISIONS))}")
    if precision == FLOAT:
        if any(setting is not None for setting in (points, *others)):
            raise ValueError("calibration, points, task and equalise are settings of precision='int8'")
        return
    able = [name for name, runtime in RUNTIMES.items() if runtime.save is not None]
    if to not in able:
        raise ValueError(
            f"8 bits are written for {' and '.join(map(repr, able))}, not for {to!r}: choose one of these, or "
            "precision='float'"
        )
    if images < LEAST_IMAGES:
        raise ValueError(f"calibration_images is {images}, expected {LEAST_IMAGES} or more")
    if points is not None and not 0 < points <= 100:
        raise ValueError(f"points is {points}, expected a loss in percent of the score, above 0")


def _check_batch(subject: Subject, largest_batch: int | None) -> None:
    batch = subject.call.tensors[0].shape[0] if subject.dynamic != NONE else 0
    if largest_batch is not None and batch > largest_batch:
        raise ExportError(
            f"the example has {batch} images, and the largest batch is {largest_batch}: give fewer, or "
            f"largest_batch={batch}"
        )


def _operations_of(program: ExportedProgram) -> dict[str, int]:
    names = (node.target.name() for node in program.graph.nodes if isinstance(node.target, OpOverload))
    return dict(Counter(name.removeprefix("aten::").partition(".")[0] for name in names))


class _Written(NamedTuple):
    files: tuple[Path, ...]
    facts: dict[str, Any]
    comparison: Comparison | None
    quantisation: Quantisation | None


def _write(
    runtime: Runtime,
    subject: Subject,
    program: ExportedProgram,
    facts: dict[str, Any],
    path: Path,
    calls: Sequence[Call],
    samples: Samples | None,
    equalised: int,
) -> _Written:
    """Write into a folder beside `path`, compare what was written on `calls`, and only then put it there. Raises
    OSError, too.

    samples: None for a file in float.
    """
    count = sum(_operations_of(program).values())
    with temporary_beside(path) as folder:
        folder.mkdir()
        try:
            parts = runtime.write(program, subject, json.dumps(facts), folder / path.name)
        except (ExportError, OSError):
            raise
        except Exception as error:  # whatever another project raises
            if is_out_of_memory(error):
                raise
            raise ExportError(
                f"{runtime.title} does not take {subject.name()}: {reason_of(error)}"
            ) from error
        comparison = quantisation = None
        if calls and not runtime.missing(running=True):
            comparison = compare(subject, runtime.run, parts[0], calls, count, runtime.title)
        elif calls:
            logger.warning(
                "%s is not compared with the model: pip install %s",
                path,
                " ".join(runtime.missing(running=True)),
            )
        if samples is not None:
            parts, facts, quantisation = _write_in_8_bits(
                runtime, subject, program, facts, folder / path.name, samples, equalised
            )
        return _Written(_put(parts, path), facts, comparison, quantisation)


def _write_in_8_bits(
    runtime: Runtime,
    subject: Subject,
    program: ExportedProgram,
    facts: dict[str, Any],
    path: Path,
    samples: Samples,
    equalised: int,
) -> tuple[list[Path], dict[str, Any], Quantisation]:
    save = runtime.save
    assert save is not None

    def tried(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:  # whatever another project raises
            if is_out_of_memory(error) or isinstance(error, OSError):
                raise
            raise ExportError(
                f"{runtime.title} cannot run {subject.name()} in 8 bits: {reason_of(error)}; export it in float"
            ) from error

    def load(model: bytes, path: Path) -> Run:
        run = tried(lambda: runtime.run(save(model, "", path)[0]))
        return lambda *inputs: tried(run, *inputs)

    in_float = onnx_file(program, subject, "")
    # In a file of its own: a runtime may read weights from it as long as it runs.
    in_full = load(in_float, path.with_stem("in_float"))
    tries = functools.partial(load, path=path)
    rounded, quantisation = quantise(in_float, in_full, subject, samples, tries, equalised, runtime.uniform)
    facts = {**facts, "precision": INT8, "quantisation": quantisation.document()}
    document = json.dumps(facts)
    return save(with_facts(rounded, document), document, path), facts, quantisation


def _put(parts: list[Path], path: Path) -> tuple[Path, ...]:
    """Move a file, and those that belong to it, to where they shall be: it comes last, and an earlier one goes first,
    so that it never stands beside what belongs to another.
    """
    main, *others = parts
    for part in parts:
        with open(part, "rb") as file:
            os.fsync(file.fileno())
    if others:
        path.unlink(missing_ok=True)
    for part in (*others, main):
        os.replace(part, path.with_name(part.name))
    sync_folder(path.parent)
    return tuple(path.with_name(part.name) for part in parts)
