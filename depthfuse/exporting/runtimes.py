"""The runtimes that a model is exported to: what each needs, how its file is written, and how that runs here."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from depthfuse.acceleration.planning.part import as_tuple
from depthfuse.acceleration.running.conversion import Run, executorch, executorch_of, onnxruntime, openvino
from depthfuse.errors import ExportError
from depthfuse.exporting.facts import KEY
from depthfuse.exporting.onnx_file import onnx_file
from depthfuse.exporting.subject import Subject

Write = Callable[[ExportedProgram, Subject, str, Path], list[Path]]
Save = Callable[[bytes, str, Path], list[Path]]


@dataclass(frozen=True)
class Runtime:
    """One of `RUNTIMES`.

    title: in messages. suffix: of the file. write: (program, subject, facts as JSON, path) -> the files written, the
    one at `path` first. run: from the file to what runs it. extra, packages: what writing takes beside torch.
    for_running: what comparing takes beside that. must_run: whether a file that cannot be run here is not written.
    on_cpu: the program is exported on a CPU, wherever the model is. largest_batch: where an open batch has to have an
    end, which memory is laid out for. save: (ONNX in 8 bits with facts, the facts as JSON, path) -> the files written;
    None for what takes none from here. uniform: whether 8 bits have to be in one form, see `uniform_integers`.
    """

    title: str
    suffix: str
    write: Write
    run: Callable[[Path], Run]
    extra: str | None = None
    packages: tuple[str, ...] = ()
    for_running: tuple[str, ...] = ()
    must_run: bool = True
    on_cpu: bool = True
    largest_batch: int | None = None
    save: Save | None = None
    uniform: bool = False

    def missing(self, running: bool) -> list[str]:
        """The packages that are not installed."""
        return absent(*self.packages, *(self.for_running if running else ()))

    def require(self, check: bool) -> None:
        """Raise ExportError, naming what to install, where a package is missing."""
        lacking = self.missing(running=check and self.must_run)
        if lacking:
            without = ", or export with check=False" if not self.missing(running=False) else ""
            raise ExportError(
                f'{self.title} needs {" and ".join(lacking)}: pip install "depthfuse[{self.extra}]"{without}'
            )


def absent(*packages: str) -> list[str]:
    """Those that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def _write_onnx(program: ExportedProgram, subject: Subject, facts: str, path: Path) -> list[Path]:
    return _save_onnx(onnx_file(program, subject, facts), facts, path)


def _save_onnx(model: bytes, facts: str, path: Path) -> list[Path]:
    path.write_bytes(model)
    return [path]


def _write_for(parser: str) -> Write:
    def write(program: ExportedProgram, subject: Subject, facts: str, path: Path) -> list[Path]:
        path.write_bytes(onnx_file(program, subject, facts, parser))
        return [path]

    return write


def _run_onnx(path: Path) -> Run:
    return onnxruntime(path, torch.get_num_threads())


def _write_openvino(program: ExportedProgram, subject: Subject, facts: str, path: Path) -> list[Path]:
    return _save_openvino(onnx_file(program, subject, facts), facts, path)


def _save_openvino(model: bytes, facts: str, path: Path) -> list[Path]:
    import openvino as ov

    network = ov.Core().read_model(model)
    network.set_rt_info(facts, [KEY])
    ov.save_model(network, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def _run_openvino(path: Path) -> Run:
    return openvino(path, torch.get_num_threads())


def _write_torch(program: ExportedProgram, subject: Subject, facts: str, path: Path) -> list[Path]:
    program._example_inputs = None  # the user's own images
    torch.export.save(program, path, extra_files={KEY: facts})
    return [path]


def _run_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda *inputs: as_tuple(module(*inputs))


def _write_aoti(program: ExportedProgram, subject: Subject, facts: str, path: Path) -> list[Path]:
    if subject.plan.device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ExportError(
            "AOTInductor needs a C++ compiler, and there is neither g++ nor clang++: install one"
        )
    settings = {"aot_inductor.metadata": {KEY: facts}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Inductor about itself
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    return [path]


def _run_aoti(path: Path) -> Run:
    loaded = torch._inductor.aoti_load_package(str(path))

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return as_tuple(loaded(*inputs))

    return run


def _write_executorch(program: ExportedProgram, subject: Subject, facts: str, path: Path) -> list[Path]:
    path.write_bytes(executorch_of(program, {KEY: facts}))
    return [path]


def _run_executorch(path: Path) -> Run:
    return executorch(path, torch.get_num_threads())


_ONNX = ("onnx", "onnxscript")

RUNTIMES: dict[str, Runtime] = {
    "onnx": Runtime(
        "ONNX Runtime",
        ".onnx",
        _write_onnx,
        _run_onnx,
        "onnx",
        _ONNX,
        for_running=("onnxruntime",),
        save=_save_onnx,
        uniform=True,
    ),
    "openvino": Runtime(
        "OpenVINO",
        ".xml",
        _write_openvino,
        _run_openvino,
        "openvino",
        ("openvino", *_ONNX),
        save=_save_openvino,
    ),
    "torch": Runtime("torch.export", ".pt2", _write_torch, _run_torch),
    "aoti": Runtime("AOTInductor", ".pt2", _write_aoti, _run_aoti, on_cpu=False),
    "executorch": Runtime(
        "ExecuTorch",
        ".pte",
        _write_executorch,
        _run_executorch,
        "executorch",
        ("executorch",),
        largest_batch=64,
    ),
    "tensorrt": Runtime(
        "TensorRT",
        ".onnx",
        _write_for("TensorRT"),
        _run_onnx,
        "onnx",
        _ONNX,
        for_running=("onnxruntime",),
        must_run=False,
    ),
    "migraphx": Runtime(
        "MIGraphX",
        ".onnx",
        _write_for("MIGraphX"),
        _run_onnx,
        "onnx",
        _ONNX,
        for_running=("onnxruntime",),
        must_run=False,
    ),
}
