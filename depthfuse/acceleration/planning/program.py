"""What a model computes for calls of one form, as a graph of PyTorch's operators (aten) without side effects.

`capture` is the one way into planning: torch.export in its non-strict mode, which runs the model's own Python once with
symbols in the place of sizes. What comes out says in `Program` for which calls it is right.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.experimental import _config as settings
from torch.overrides import TorchFunctionMode

from depthfuse.acceleration.planning import aten
from depthfuse.acceleration.planning.exporting import (
    TooLongFormula,
    alone,
    any_layout,
    known_shapes,
    short_formulas,
)
from depthfuse.acceleration.planning.leftovers import environments_freed, no_circle, sources_forgotten
from depthfuse.acceleration.planning.sizes import Sizes
from depthfuse.acceleration.planning.trees import Container, Tree, flatten, in_words, unflatten
from depthfuse.errors import AccelerationError
from depthfuse.untrusted import is_out_of_memory

logger = logging.getLogger(__name__)

_MODEL = "model"  # the model's name in the module that is exported


class CaptureError(AccelerationError):
    """What a model computes depends on more than the form of its call: it cannot be captured as one graph."""


@dataclass(frozen=True)
class Call:
    """The arguments of a call: its tensors, and what held them, an (args, kwargs)."""

    tensors: tuple[Tensor, ...]
    tree: Tree

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> Call:
        """Raises AccelerationError for arguments that are neither tensors nor plain values."""
        tensors, tree = flatten((args, kwargs))
        return cls(tuple(tensors), tree)

    def arguments(self, tensors: Sequence[Tensor] | None = None) -> tuple[tuple, dict[str, Any]]:
        """The (args, kwargs) again, with other tensors where these are given."""
        return unflatten(self.tensors if tensors is None else tensors, self.tree)

    def on_clones(self) -> Call:
        """The same call with tensors of its own, which a model may write over."""
        return replace(self, tensors=tuple(x.detach().clone() for x in self.tensors))

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(x.shape) for x in self.tensors)

    def __str__(self) -> str:
        """As (float32[1, 3, 8, 8], mask=None)."""
        assert isinstance(self.tree, Container)
        inner = [in_words(child, self.tensors)[1:-1] for child in self.tree.children]
        return f"({', '.join(text for text in inner if text)})"


# The axes by their strides, the longest first, and whether the values fill the memory between first and last. Axes
# along which there is one value, or none, count as if they were laid out in order.
Layout = tuple[tuple[int, ...], bool]


def layout_of(x: Tensor) -> Layout:
    """How a tensor lies in memory, whatever its sizes are."""
    x = x if x.layout == torch.strided else x.new_empty(0)
    axes = range(x.dim())
    steps = list(x.stride())
    following = 1
    for axis in reversed(axes):
        if x.shape[axis] < 2:
            steps[axis] = following
        following = max(following, steps[axis] * max(x.shape[axis], 1))
    order = tuple(sorted(axes, key=lambda axis: -steps[axis]))
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True) if n)
    return order, x.numel() == 0 or extent == x.numel()


@dataclass(frozen=True, eq=False)
class Program:
    """A graph, and the calls that it is right for.

    graph: one placeholder for each tensor of a call, in order; its output is a tuple. Parameters and buffers are read
    by their names in the model. Each node's `meta["val"]` has the value's shape (with symbols) and dtype.
    tree, dtypes, sizes, layouts: of the calls that it is right for, see `Form`. outputs: what holds its outputs.
    writes_inputs: whether the model writes over tensors that it is given; so does the graph.
    """

    graph: fx.GraphModule
    tree: Tree
    dtypes: tuple[torch.dtype, ...]
    sizes: Sizes
    layouts: tuple[Layout, ...] | None
    outputs: Tree
    writes_inputs: bool

    def form(self) -> Form:
        return Form(self.tree, self.dtypes, self.sizes, self.layouts)


@dataclass(frozen=True)
class Form:
    """The calls that a program is right for.

    layouts: how their tensors lie in memory, where the model asks for that; None for any.
    """

    tree: Tree
    dtypes: tuple[torch.dtype, ...]
    sizes: Sizes
    layouts: tuple[Layout, ...] | None = None

    def takes(self, call: Call) -> bool:
        return (
            call.tree == self.tree
            and tuple(x.dtype for x in call.tensors) == self.dtypes
            and self.sizes.take(call.shapes())
            and self.layouts in (None, tuple(map(layout_of, call.tensors)))
        )


class _Found:
    """What is found while a model is traced: torch.export puts lists and dictionaries back as they were."""

    outputs: Tree
    asks_for_layouts: bool


class _Questions(TorchFunctionMode):
    """Notices what a model's own code asks of tensors. What PyTorch asks in carrying out its operators is not seen."""

    _LAYOUT = (Tensor.stride, Tensor.is_contiguous, Tensor.dim_order)

    for_layouts = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.for_layouts |= function in self._LAYOUT
        return function(*args, **(kwargs or {}))


class _Flat(nn.Module):
    """A model that takes a list of tensors and gives one."""

    def __init__(self, model: nn.Module, tree: Tree) -> None:
        super().__init__()
        self.model = model
        self._tree = tree
        self.found = _Found()

    def forward(self, tensors: list[Tensor]) -> tuple[Any, ...]:
        args, kwargs = unflatten(tensors, self._tree)
        with _Questions() as questions:
            outputs = self.model(*args, **kwargs)
        leaves, tree = flatten(outputs, once=True)
        self.found.outputs, self.found.asks_for_layouts = tree, questions.for_layouts
        return tuple(leaves)


def capture(model: nn.Module, call: Call, dynamic: bool = True) -> Program:
    """The program of `model` for calls like `call`.

    Args:
        model: in evaluation mode. Its own Python runs: give a copy where that may leave traces in it.
        dynamic: leave all sizes open that the model leaves open. False: for the sizes of `call` alone.

    Raises:
        CaptureError: it cannot be captured; the message says why.
    """
    if not call.tensors:
        raise CaptureError("the call has no tensors")
    with sources_forgotten() as kept, environments_freed():
        program = _capture_widest(model, call, dynamic)
        kept.append(program.graph)
        return program


def _capture_widest(model: nn.Module, call: Call, dynamic: bool) -> Program:
    """The program for as many calls as can be."""
    # All sizes open; then the first axes alone, where sizes of images make too long formulas; then with sizes of 1 that
    # are there to be broadcast.
    attempts = ((_ALL, True), (_FIRST, True), (_ALL, False), (_FIRST, False)) if dynamic else ()
    for axes, with_ones in attempts:
        try:
            program = _capture(model, call, axes, with_ones)
        except TooLongFormula as error:
            logger.debug("only its batch size is open: %s", error)
        except CaptureError as error:
            if not with_ones:
                raise
            logger.debug("a size of 1 is not taken for any size: %s", error)
        else:
            if program.form().takes(call):
                return program
            logger.debug("the conditions of its sizes are not understood: %s", program.sizes.conditions)
    return _capture(model, call, _NONE, with_ones=False)


_ALL, _FIRST, _NONE = slice(None), slice(1), slice(0)
_LONGEST_FORMULA = 60  # operations in a condition of sizes; what is longer takes minutes to reason about


def _capture(model: nn.Module, call: Call, axes: slice, with_ones: bool) -> Program:
    """axes: those that are left open. with_ones: sizes of 0 and 1 are like any other; where a 1 is there to be
    broadcast, that fails.
    """
    flat = _Flat(model, call.tree).eval()
    shapes = ([dict.fromkeys(range(x.dim())[axes], Dim.AUTO) for x in call.tensors],)
    oblivious = settings.patch(backed_size_oblivious=with_ones)
    try:
        with (
            torch.no_grad(),
            oblivious,
            alone(),
            any_layout(),
            known_shapes(),
            short_formulas(_LONGEST_FORMULA),
        ):
            exported = export(flat, (list(call.tensors),), dynamic_shapes=shapes, strict=False)
            outputs = flat.found.outputs
            state: list[str] = []
            graph = _flat_graph(exported)
            if not _make_functional(graph):
                exported = exported.run_decompositions({})
                state = list(exported.graph_signature.buffers_to_mutate.values())
                graph = _flat_graph(exported)
            no_circle(exported.graph_module)
    except TooLongFormula:
        raise
    except Exception as error:  # export raises whatever the model's Python, PyTorch or sympy do
        if is_out_of_memory(error):
            raise
        raise CaptureError(_first_line(error)) from error
    if any(aten.name_of(node) == "as_strided" for node in graph.graph.nodes):
        raise CaptureError("it reads values by where they lie in memory (as_strided), which is not kept")
    if state:
        raise CaptureError(f"it keeps state between calls in {state[0].removeprefix(_MODEL + '.')}")
    _free_layouts(graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(call.tensors):
        raise CaptureError("it has other inputs than it was given")
    return Program(
        graph,
        call.tree,
        tuple(x.dtype for x in call.tensors),
        _sizes(exported, graph.graph, placeholders),
        tuple(map(layout_of, call.tensors)) if flat.found.asks_for_layouts else None,
        outputs,
        any(aten.name_of(node) == "copy_" for node in graph.graph.nodes),
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _flat_graph(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph with the model's own names for its tensors, without the checks of its inputs."""
    module = exported.module()
    graph = module.graph
    graph.set_codegen(fx.CodeGen())
    attributes: dict[str, Any] = {}
    for node in list(graph.nodes):
        node.meta = {"path": _path(node), "val": node.meta.get("val")}
        if (
            node.target == "_guards_fn"
            or aten.name_of(node) in _CHECKS
            or (node.op == "get_attr" and not node.users)
        ):
            graph.erase_node(node)
        elif node.op == "get_attr":
            value = module
            for name in node.target.split("."):
                value = getattr(value, name)
            node.target = node.target.removeprefix(f"{_MODEL}.")
            attributes[node.target] = value
        elif node.op == "output":
            (values,) = node.args
            node.args = (tuple(values) if isinstance(values, list | tuple) else (values,),)
    return fx.GraphModule(attributes, graph, "Program")


def _path(node: fx.Node) -> str:
    """The path in the model of the innermost module that a node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix(f"{_MODEL}.") if path.startswith(f"{_MODEL}.") else ""


# They state what is true of any call that the program takes, and would count as readers of what they look at.
_CHECKS = frozenset(("_assert_tensor_metadata", "sym_constrain_range_for_size", "sym_constrain_range"))


def _make_functional(program: fx.GraphModule) -> bool:
    """Write operations in place as such that give a new value, where nothing else can see the old one; False where
    that cannot be told, with the graph half done.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if aten.is_idle_dropout(node):  # which hands its very input on
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if aten.updates_statistics(node):
            return False
        if not aten.writes(node):
            continue
        new = aten.out_of_place(node)
        overwritten = node.args[0]
        if new is None or not aten.is_fresh(overwritten):
            return False
        if not all(aten.is_fresh(user) for user in overwritten.users if order[user] < order[node]):
            return False
        for user in list(overwritten.users):
            if order[user] > order[node]:
                user.replace_input_with(overwritten, node)
        node.target = new
    return True


def _free_layouts(program: fx.GraphModule) -> None:
    """Write views as reshapes: values may lie otherwise in memory than where the program was captured."""
    for node in program.graph.nodes:
        if aten.name_of(node) in ("view", "_unsafe_view") and node.target._overloadname == "default":
            node.target = torch.ops.aten.reshape.default
    program.graph.eliminate_dead_code()  # what a model has tried in vain may be left over
    program.recompile()


def _sizes(exported: torch.export.ExportedProgram, graph: fx.Graph, placeholders: list[fx.Node]) -> Sizes:
    shapes, environment = [], None
    for node in placeholders:
        value = node.meta["val"]
        environment = environment or getattr(getattr(value, "fake_mode", None), "shape_env", None)
        shapes.append(tuple(aten.size_of(size) for size in value.shape))
    if environment is None:
        return Sizes(tuple(shapes), (), ())
    replaced = environment.replacements
    conditions = [str(guard.expr.xreplace(replaced).xreplace(replaced)) for guard in environment.guards]
    conditions += _where_ones_matter(graph)
    used = {text for shape in shapes for text in shape if isinstance(text, str)}
    least = []
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) not in used:
            continue
        least.append((str(symbol), int(bounds.lower)))
        if bounds.upper.is_number and bounds.upper.is_finite and bounds.upper < 2**62:
            conditions.append(f"{symbol} <= {int(bounds.upper)}")
    return Sizes(tuple(shapes), tuple(least), tuple(dict.fromkeys(t for t in conditions if t != "True")))


def _where_ones_matter(graph: fx.Graph) -> list[str]:
    """Conditions for operators whose number of axes depends on whether a size is 1; the program has one number."""
    conditions = []
    for node in graph.nodes:
        if aten.name_of(node) == "squeeze":
            sizes = aten.shape_of(node.args[0]) or ()
            axes = node.args[1] if len(node.args) > 1 else range(len(sizes))
            axes = [axes] if isinstance(axes, int) else axes
            conditions += [f"Ne({sizes[axis]}, 1)" for axis in axes if isinstance(sizes[axis], str)]
    return conditions
