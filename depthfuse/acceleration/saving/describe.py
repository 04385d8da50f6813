"""Plans as JSON and back: modules by the arguments of their constructors, graphs by their nodes.

Nothing that a description says is executed: functions, methods and layers are looked up in lists, and names are checked
before torch.fx writes code with them.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning.graph import PlanGraph
from depthfuse.acceleration.planning.part import PlannedPart
from depthfuse.acceleration.planning.program import Form
from depthfuse.acceleration.planning.signature import UNKNOWN, Signature
from depthfuse.acceleration.planning.sizes import Sizes
from depthfuse.acceleration.planning.trees import Constant, Container, Leaf, Tree
from depthfuse.acceleration.saving.functions import FUNCTIONS, NAMES
from depthfuse.errors import DepthfuseError
from depthfuse.fused.blocks import FUSED_MODULES
from depthfuse.fused.layers import FusedModule

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
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
    if isinstance(module, PlannedPart):
        return {
            "part": describe(module.graph, path),
            "form": describe_form(module.form),
            "outputs": describe_tree(module.outputs),
            "signature": describe_signature(module.signature),
        }
    if isinstance(module, FusedModule):
        given = [name for name, tensor in module.tensors().items() if tensor is not None]
        return {"fused": type(module).__name__, "config": module.config(), "tensors": given}
    if isinstance(module, fx.GraphModule):
        nodes = list(module.graph.nodes)
        modules = dict.fromkeys(node.target for node in nodes if node.op == "call_module")
        tensors = list(dict.fromkeys(node.target for node in nodes if node.op == "get_attr"))
        held = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        if not held.issuperset(tensors):
            raise IndescribableError("a region of its own (autocast, or control flow by values)")
        return {
            "nodes": [_describe_node(node) for node in nodes],
            "modules": {name: describe(module.get_submodule(name), _join(path, name)) for name in modules},
            "tensors": tensors,
        }
    return {"source": path, "inside": _parts_inside(module, path)}


def _parts_inside(module: nn.Module, path: str) -> dict[str, Any]:
    """The outermost graphs in a module that comes from the model's own code."""
    parts: dict[str, Any] = {}
    for name, inner in module.named_modules():
        if isinstance(inner, PlannedPart) and not any(name.startswith(f"{outer}.") for outer in parts):
            parts[name] = describe(inner, _join(path, name))
    return parts


def sources(description: dict[str, Any]) -> list[str]:
    """The paths of the modules that have to come from the model's own code."""
    inner = [*description.get("modules", {}).values(), *description.get("inside", {}).values()]
    inner += [description["part"]] if "part" in description else []
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
        if "part" in description:
            graph = rebuild(description["part"], tensors, from_source, _join(path, "graph"))
            if not isinstance(graph, fx.GraphModule):
                raise DescriptionError(f"{path}: expected a graph")
            form, outputs = rebuild_form(description["form"]), rebuild_tree(description["outputs"])
            return PlannedPart(graph, form, outputs, rebuild_signature(description["signature"]), None)
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
        if op not in ("placeholder", "get_attr", "call_module", "call_function", "output"):
            raise DescriptionError(f"unknown operation {op!r}")
        if not _NAME.fullmatch(name):
            raise DescriptionError(f"{name!r} is no name for a node")
        args = tuple(_decode(value, nodes) for value in node["args"])
        kwargs = {_checked_name(key): _decode(value, nodes) for key, value in node["kwargs"].items()}
        nodes[name] = graph.create_node(op, _target(op, target, args), args, kwargs, name)
        if nodes[name].name != name:
            raise DescriptionError(f"{name!r} is no name for a node, or names two")
    graph.lint()
    return PlanGraph(root, graph, "Plan")


def _target(op: str, target: Any, args: tuple) -> Any:
    """What a node calls or reads, from the lists or by a checked name."""
    if op == "call_function":
        if target not in FUNCTIONS:
            raise DescriptionError(f"unknown function {target!r}")
        return FUNCTIONS[target]
    pattern = _PATH if op in ("get_attr", "call_module") else _NAME
    if not pattern.fullmatch(target):
        raise DescriptionError(f"{target!r} is no name")
    return target


def _describe_node(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        if node.target not in NAMES:
            raise IndescribableError(f"the function {node.target}")
        target = NAMES[node.target]
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encode(value) for value in node.args],
        "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
    }


# The containers that a file can name.
_CONTAINERS: dict[str, type] = {
    cls.__name__: cls for cls in (list, tuple, dict, OrderedDict, slice, torch.Size)
}


def describe_tree(tree: Tree) -> Any:
    """What holds the tensors of a call or of outputs, as JSON. Raises IndescribableError for other classes."""
    if isinstance(tree, Leaf):
        return {"leaf": tree.index}
    if isinstance(tree, Constant):
        return {"constant": _encode(tree.value)}
    if _CONTAINERS.get(tree.cls.__name__) is not tree.cls:
        raise IndescribableError(
            f"an argument or output of the class {tree.cls.__module__}.{tree.cls.__qualname__}, where a file knows "
            f"{', '.join(_CONTAINERS)}"
        )
    children = [describe_tree(child) for child in tree.children]
    return {"container": tree.cls.__name__, "keys": [_encode(key) for key in tree.keys], "children": children}


def rebuild_tree(document: Any) -> Tree:
    """Raises DescriptionError for what no tree is."""
    if not isinstance(document, dict):
        raise DescriptionError(f"{document!r:.80} holds no tensors")
    if set(document) == {"leaf"} and type(document["leaf"]) is int and 0 <= document["leaf"] < 10_000:
        return Leaf(document["leaf"])
    if set(document) == {"constant"}:
        return Constant(_decode(document["constant"], {}))
    if set(document) == {"container", "keys", "children"} and document["container"] in _CONTAINERS:
        keys = tuple(_decode(key, {}) for key in document["keys"])
        children = tuple(rebuild_tree(child) for child in document["children"])
        cls = _CONTAINERS[document["container"]]
        if len(keys) != (len(children) if issubclass(cls, dict) else 0):
            raise DescriptionError(f"{len(keys)} keys for {len(children)} values")
        return Container(cls, keys, children)
    raise DescriptionError(f"{document!r:.80} is no container that this version knows")


def leaves_of(tree: Tree) -> set[int]:
    """The numbers of its leaves."""
    if isinstance(tree, Container):
        return set().union(*map(leaves_of, tree.children)) if tree.children else set()
    return {tree.index} if isinstance(tree, Leaf) else set()


def describe_form(form: Form) -> dict[str, Any]:
    sizes = form.sizes
    return {
        "tree": describe_tree(form.tree),
        "dtypes": [_encode(dtype) for dtype in form.dtypes],
        "shapes": [list(shape) for shape in sizes.shapes],
        "least": [list(pair) for pair in sizes.least],
        "conditions": list(sizes.conditions),
        "layouts": None if form.layouts is None else [[list(order), full] for order, full in form.layouts],
    }


def rebuild_form(document: Any) -> Form:
    """Raises DescriptionError for what no form is."""
    tree = rebuild_tree(document["tree"])
    dtypes = tuple(_decode(dtype, {}) for dtype in document["dtypes"])
    shapes = tuple(tuple(shape) for shape in document["shapes"])
    least = tuple((name, size) for name, size in document["least"])
    conditions = tuple(document["conditions"])
    layouts = document["layouts"]
    if layouts is not None:
        layouts = tuple((tuple(order), full) for order, full in layouts)
    plain = (
        all(isinstance(dtype, torch.dtype) for dtype in dtypes)
        and len(dtypes) == len(shapes)
        and leaves_of(tree) == set(range(len(shapes)))
        and all(isinstance(n, str) or (type(n) is int and n >= 0) for shape in shapes for n in shape)
        and all(isinstance(name, str) and type(size) is int for name, size in least)
        and all(isinstance(text, str) for text in conditions)
        and (layouts is None or len(layouts) == len(shapes))
        and all(
            type(full) is bool and all(type(axis) is int for axis in order) for order, full in layouts or ()
        )
    )
    if not plain:
        raise DescriptionError(f"{document!r:.80} says not which calls a plan takes")
    return Form(tree, dtypes, Sizes(shapes, least, conditions), layouts)


def describe_signature(signature: Signature) -> list[Any]:
    return [
        [name, kind, {"unknown": None} if default is UNKNOWN else _encode(default)]
        for name, kind, default in signature.parameters
    ]


def rebuild_signature(document: Any) -> Signature:
    """Raises DescriptionError for what no signature is."""
    parameters = []
    for name, kind, default in document:
        if not isinstance(name, str) or kind not in _KINDS:
            raise DescriptionError(f"{name!r:.40} of the kind {kind!r:.40} is no argument")
        known = UNKNOWN if default == {"unknown": None} else _decode(default, {})
        parameters.append((name, kind, known))
    return Signature(tuple(parameters))


_KINDS = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD")


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
    if isinstance(value, torch.device):
        return {"device": None}  # that of the plan
    if isinstance(value, torch.layout) and value == torch.strided:
        return {"strided": None}
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
    if kind == "device":
        return torch.device("cpu")  # where plans are loaded first
    if kind == "strided":
        return torch.strided
    if kind == "layout":
        return _LAYOUTS[content]
    if kind == "dtype" and content in _DTYPES:
        return getattr(torch, content)
    raise DescriptionError(f"unknown kind of value {kind!r}")


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
