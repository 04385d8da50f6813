"""A program as ONNX, for people to read: named axes, the model's own names, and nothing of this machine."""

from __future__ import annotations

import ast
from collections import Counter
from typing import Any

from torch.export import ExportedProgram

from depthfuse.acceleration.running.conversion import onnx_of
from depthfuse.exporting.facts import KEY
from depthfuse.exporting.operators import check_operators
from depthfuse.exporting.subject import Subject

OPSET = 18  # MIGraphX reads up to 19, TensorRT has read this one since 8.6


def onnx_file(program: ExportedProgram, subject: Subject, facts: str, parser: str | None = None) -> bytes:
    """The bytes of a model in one file, with the facts in its metadata.

    parser: what is to read it, where that is told from its documentation alone: see `check_operators`.
    """
    import onnx

    inputs = tuple(x.detach().contiguous() for x in subject.call.tensors)
    data = onnx_of(program, inputs, subject.input_names(), subject.output_names(), OPSET)
    model = onnx.load_model_from_string(data)
    graph = model.graph
    graph.name = subject.name()
    _name_axes(graph, program, subject)
    _name_layers(graph, subject)
    for each in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del each.metadata_props[:]
    del graph.metadata_props[:], model.metadata_props[:], model.functions[:]
    _drop_idle_flags(graph)
    onnx.helper.set_model_props(model, {KEY: facts})
    onnx.checker.check_model(model, full_check=True)
    if parser is not None:
        check_operators(model, parser)
    return model.SerializeToString()


def with_facts(data: bytes, facts: str) -> bytes:
    """The same model with other facts."""
    import onnx

    model = onnx.load_model_from_string(data)
    onnx.helper.set_model_props(model, {KEY: facts})
    return model.SerializeToString()


def _name_axes(graph: Any, program: ExportedProgram, subject: Subject) -> None:
    """Axes that are open by their names instead of PyTorch's symbols."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.name in names]
    names_of: dict[str, str] = {}
    for value, axes in zip(values, subject.open_axes(), strict=True):
        names_of |= {str(value.shape[axis]): name for axis, name in axes.items()}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names_of:
                dim.dim_param = names_of[dim.dim_param]


def layer_names(subject: Subject) -> dict[str, str]:
    """{path of a layer in the plan: its name in files}: its path in the model that it stands for, which nodes
    ("NAME/Conv") and weights ("NAME.weight") are called by. Where one layer of the model is several of the plan's, as
    it is called twice with other things behind it, all have the plan's paths.
    """
    names = {entry.module: entry.path for entry in subject.plan.entries if entry.module}
    return names if len(set(names.values())) == len(names) else {module: module for module in names}


def _name_layers(graph: Any, subject: Subject) -> None:
    names = layer_names(subject)
    seen: Counter[str] = Counter()
    for node in graph.node:
        module = _module_of(node)
        if module in names:
            name = f"{names[module]}/{node.op_type}"
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    weights = {each.name: each.name for each in graph.initializer}
    for name in weights:
        module, _, tensor = name.rpartition(".")
        if module in names:
            weights[name] = f"{names[module]}.{tensor}"
    for each in graph.initializer:
        each.name = weights[each.name]
    for node in graph.node:
        node.input[:] = [weights.get(name, name) for name in node.input]


def _drop_idle_flags(graph: Any) -> None:
    """Reshapes to sizes without a zero do not ask what a zero means; not every parser knows the flag."""
    from onnx.numpy_helper import to_array

    sizes = {each.name: each for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in sizes and to_array(sizes[node.input[1]]).all():
            kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _module_of(node: Any) -> str | None:
    """The module of the plan that PyTorch says a node comes from."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(entry.value)
            return scopes[-2] if len(scopes) > 1 else None
    return None
