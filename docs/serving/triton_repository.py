"""Lay out a model repository for Triton Inference Server from an ONNX file that `depthfuse export` wrote.

    python triton_repository.py photos.onnx --repository models --name photos

Needs onnx. Names, dtypes and sizes are read from the file; whatever stood in the version's folder is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import onnx

# https://docs.nvidia.com/deeplearning/triton-inference-server/, Datatypes
_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.DOUBLE: "TYPE_FP64",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}
_LABELS = "labels.txt"


def tensor_text(value: onnx.ValueInfoProto, is_batched: bool, labels: str | None = None) -> str:
    """One entry of `input` or `output`; -1 for a size that is open. Triton adds the batch, where that is open."""
    kind = value.type.tensor_type
    if kind.elem_type not in _TYPES:
        raise SystemExit(f"{value.name} is of a type that Triton does not have: {kind.elem_type}")
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
    shape = ", ".join(map(str, dims[1:] if is_batched else dims))
    lines = f'name: "{value.name}"', f"data_type: {_TYPES[kind.elem_type]}", f"dims: [ {shape} ]"
    named = (f'label_filename: "{labels}"',) if labels else ()
    return "  {\n" + "".join(f"    {line}\n" for line in (*lines, *named)) + "  }"


def is_batched(graph: onnx.GraphProto) -> bool:
    """Whether the first size of every input and output is open."""
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    return all(len(dims) > 0 and not dims[0].HasField("dim_value") for dims in shapes)


def config_text(model: onnx.ModelProto, name: str, largest_batch: int, has_labels: bool) -> str:
    """The model's config.pbtxt."""
    batched = is_batched(model.graph)
    labels = _LABELS if has_labels else None
    inputs = ",\n".join(tensor_text(value, batched) for value in model.graph.input)
    outputs = ",\n".join(
        tensor_text(value, batched, None if i else labels) for i, value in enumerate(model.graph.output)
    )
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: {largest_batch if batched else 0}\n'
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n" + ("dynamic_batching { }\n" if batched else "")
    )


def lay_out(file: Path, repository: Path, name: str, version: int, largest_batch: int) -> Path:
    """Write `repository`/`name`; returns that folder. The model comes last, so that Triton never finds half of one."""
    model = onnx.load(file)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    classes = json.loads(facts.get("depthfuse", "{}")).get("classes")
    folder, target = repository / name, repository / name / str(version) / "model.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    if classes:
        (folder / _LABELS).write_text("\n".join(classes) + "\n")
    (folder / "config.pbtxt").write_text(config_text(model, name, largest_batch, bool(classes)))
    beside = target.with_suffix(".tmp")
    shutil.copyfile(file, beside)
    os.replace(beside, target)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="what `depthfuse export --to onnx` or `--to tensorrt` wrote")
    parser.add_argument("--repository", type=Path, default=Path("models"))
    parser.add_argument("--name", help="of the model in Triton; default: the file's")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--largest-batch", type=int, default=32, help="where the file's batch is open")
    given = parser.parse_args(arguments)
    if given.version < 1 or given.largest_batch < 1:
        parser.error("--version and --largest-batch are 1 or more")
    if not given.file.is_file():
        parser.error(f"{given.file} is no file")
    print(
        lay_out(
            given.file, given.repository, given.name or given.file.stem, given.version, given.largest_batch
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
