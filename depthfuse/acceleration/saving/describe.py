"""Plans as JSON and back: modules by the arguments of their constructors, graphs by their nodes.

Nothing that a description says is executed: functions, methods and layers are looked up in lists, and names are checked
before torch.fx writes code with them.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.saving.functions import ATTRIBUTES, FUNCTIONS, METHODS, NAMES
from depthfuse.errors import DepthfuseError
from depthfuse.fused.blocks import FUSED_MODULES
from depthfuse.fused.layers import FusedModule
from depthfuse.merging.merged_blocks import TokenBatchNorm

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# The module at a path of the model that a plan was made from, as built anew.
FromSource = Callable[[str], nn.Module]


class IndescribableError(DepthfuseError, ValueError):
    """Something that no description stands for; the message says what."""


class DescriptionError(DepthfuseError, ValueError):
    """A description that is malformed, or asks for what is not in the lists."""


def describe(module: nn.Module, path: str = "") -> dict[str, Any]:
    """A plan, or part of one, as JSON without its tensors.

    Args:
        path: where in the model it was made from it comes from.

    Raises:
        IndescribableError: a function or a value that no description stands for.
    """
    if isinstance(module, FusedModule):
        given = [name for name, tensor in module.tensors().items() if tensor is not None]
        return {"fused": type(module).__name__, "config": module.config(), "tensors": given}
    if isinstance(module, fx.GraphModule):
        nodes = list(module.graph.nodes)
        modules = dict.fromkeys(node.target for node in nodes if node.op == "call_module")
        return {
            "nodes": [_describe_node(node) for node in nodes],
            "modules": {name: describe(module.get_submodule(name), _join(path, name)) for name in modules},
            "tensors": list(dict.fromkeys(node.target for node in nodes if node.op == "get_attr")),
        }
    layer = _layers().get(type(module).__name__)
    if layer is type(module) and not list(module.children()):
        return {"layer": layer.__name__, "arguments": _arguments(module)}
    return {"source": path, "inside": _parts_inside(module, path)}


def _parts_inside(module: nn.Module, path: str) -> dict[str, Any]:
    """The outermost graphs in a module that comes from the model's own code."""
    parts: dict[str, Any] = {}
    for name, inner in module.named_modules():
        if isinstance(inner, fx.GraphModule) and not any(name.startswith(f"{outer}.") for outer in parts):
            parts[name] = describe(inner, _join(path, name))
    return parts


def sources(description: dict[str, Any]) -> list[str]:
    """The paths of the modules that have to come from the model's own code."""
    inner = [*description.get("modules", {}).values(), *description.get("inside", {}).values()]
    own = [description["source"]] if "source" in description else []
    return own + [path for part in inner for path in sources(part)]


def rebuild(
    description: Any, tensors: dict[str, Tensor], from_source: FromSource, path: str = ""
) -> nn.Module:
    """The module of a description; its tensors are still to be loaded, but have their shapes.

    Args:
        tensors: the state dict of the whole plan. path: where in the plan this module goes.

    Raises:
        DescriptionError: see there.
    """
    try:
        if "fused" in description:
            cls = FUSED_MODULES[description["fused"]]
            given = {name: tensors[_join(path, name)] for name in description["tensors"]}
            return cls(**given, **description["config"])
        if "layer" in description:
            arguments = {name: _decode(value, {}) for name, value in description["arguments"].items()}
            return _layers()[description["layer"]](**arguments)
        if "nodes" in description:
            return _rebuild_graph(description, tensors, from_source, path)
        module = from_source(description["source"])
        for name, part in description["inside"].items():
            module.set_submodule(name, rebuild(part, tensors, from_source, _join(path, name)))
        return module
    except DescriptionError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DescriptionError(f"{path or 'the plan'}: {type(error).__name__} {error}") from error


def _rebuild_graph(
    description: dict[str, Any], tensors: dict[str, Tensor], from_source: FromSource, path: str
) -> fx.GraphModule:
    root = nn.Module()
    for target in description["tensors"]:
        parent, name = _container(root, target)
        parent.register_buffer(name, tensors[_join(path, target)])
    for target, part in description["modules"].items():
        parent, name = _container(root, target)
        parent.add_module(name, rebuild(part, tensors, from_source, _join(path, target)))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for node in description["nodes"]:
        op, name, target = node["op"], node["name"], node["target"]
        if op not in ("placeholder", "get_attr", "call_module", "call_function", "call_method", "output"):
            raise DescriptionError(f"unknown operation {op!r}")
        if not _NAME.fullmatch(name):
            raise DescriptionError(f"{name!r} is no name for a node")
        args = tuple(_decode(value, nodes) for value in node["args"])
        kwargs = {_checked_name(key): _decode(value, nodes) for key, value in node["kwargs"].items()}
        nodes[name] = graph.create_node(op, _target(op, target, args), args, kwargs, name)
        if nodes[name].name != name:
            raise DescriptionError(f"{name!r} is no name for a node, or names two")
    graph.lint()
    return fx.GraphModule(root, graph, "Plan")


def _target(op: str, target: Any, args: tuple) -> Any:
    """What a node calls or reads, from the lists or by a checked name."""
    if op == "call_function":
        if target not in FUNCTIONS:
            raise DescriptionError(f"unknown function {target!r}")
        if FUNCTIONS[target] is getattr and (len(args) != 2 or args[1] not in ATTRIBUTES):
            raise DescriptionError(f"unknown attribute {args[1:]!r}")
        return FUNCTIONS[target]
    if op == "call_method":
        if target not in METHODS:
            raise DescriptionError(f"unknown method {target!r}")
        return target
    pattern = _PATH if op in ("get_attr", "call_module") else _NAME
    if not pattern.fullmatch(target):
        raise DescriptionError(f"{target!r} is no name")
    return target


def _describe_node(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        if node.target not in NAMES:
            module, name = (
                getattr(node.target, "__module__", ""),
                getattr(node.target, "__name__", node.target),
            )
            raise IndescribableError(f"the function {module}.{name}")
        target = NAMES[node.target]
        if node.target is getattr and node.args[1] not in ATTRIBUTES:
            raise IndescribableError(f"the attribute {node.args[1]!r}")
    if node.op == "call_method" and node.target not in METHODS:
        raise IndescribableError(f"the method {node.target}")
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encode(value) for value in node.args],
        "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
    }


def _arguments(layer: nn.Module) -> dict[str, Any]:
    """The constructor's arguments, which PyTorch's layers keep under their names."""
    arguments = {}
    for name, parameter in inspect.signature(type(layer)).parameters.items():
        if name in ("device", "dtype"):
            continue
        value = getattr(layer, name, inspect.Parameter.empty)
        if name == "bias":
            value = value is not None
        if value is inspect.Parameter.empty:
            if parameter.default is inspect.Parameter.empty:
                raise IndescribableError(f"{layer}, whose argument {name!r} is unknown")
            continue
        arguments[name] = _encode(value)
    return arguments


def _encode(value: Any) -> Any:
    """JSON for an argument: plain values as they are, the rest as an object with one key, its type."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, torch.dtype) and str(value).removeprefix("torch.") in _DTYPES:
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        names = [name for name, layout in _LAYOUTS.items() if layout == value]
        if names:
            return {"layout": names[0]}
    raise IndescribableError(f"the argument {value!r:.80}")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "dict":
        return {_decode(key, nodes): _decode(item, nodes) for key, item in content}
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    if kind == "ellipsis":
        return ...
    if kind == "layout":
        return _LAYOUTS[content]
    if kind == "dtype" and content in _DTYPES:
        return getattr(torch, content)
    raise DescriptionError(f"unknown kind of value {kind!r}")


def _layers() -> dict[str, type[nn.Module]]:
    own = {"TokenBatchNorm": TokenBatchNorm}
    return own | {name: c for name, c in vars(nn).items() if isinstance(c, type) and issubclass(c, nn.Module)}


def _container(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The module that holds `target`, made where there is none, and the last part of the path."""
    if not _PATH.fullmatch(target):
        raise DescriptionError(f"{target!r} is no path")
    *parents, name = target.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    return root, name


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise DescriptionError(f"{name!r} is no name of an argument")
    return name


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
