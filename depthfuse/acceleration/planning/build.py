"""From a model to its plan: capture, simplify, fuse, own. Where that fails for the whole, the same for the children."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from depthfuse.acceleration.planning import aten, moves
from depthfuse.acceleration.planning.fuse import fuse
from depthfuse.acceleration.planning.graph import module_of, origin_of, own_tensors
from depthfuse.acceleration.planning.leftovers import sources_forgotten
from depthfuse.acceleration.planning.own import main_dtype, tensors_by_name
from depthfuse.acceleration.planning.part import PlannedPart
from depthfuse.acceleration.planning.plan import Entry, Plan
from depthfuse.acceleration.planning.program import Call, CaptureError, Program, capture
from depthfuse.acceleration.planning.signature import signature_of
from depthfuse.acceleration.planning.simplify import simplify
from depthfuse.acceleration.planning.trees import Tree, flatten, pairs_of_leaves
from depthfuse.errors import AccelerationError
from depthfuse.fused.layers import FusedModule
from depthfuse.measuring.accuracy import TOLERANCE, relative_error
from depthfuse.spec import ModelSource
from depthfuse.untrusted import is_out_of_memory

logger = logging.getLogger(__name__)


class Planned(NamedTuple):
    """What runs, or a part of it, and what it is made of."""

    module: nn.Module
    entries: list[Entry]


def build_plan(own: nn.Module, model: nn.Module, call: Call, backend: str, dynamic: bool = True) -> Plan:
    """Plan a model for calls like `call`; the plan shares nothing with it.

    Args:
        own: a copy of the model, in evaluation mode and in the dtype that the plan is to have.
        model: the model, or a copy of it in its own dtype, which has all digits of its weights.
        call: as `own` takes it.
        backend: see `depthfuse.ops.resolve_backend`. dynamic: leave sizes open, see `capture`.

    Raises:
        AccelerationError: folding took a weight beyond what the dtype holds.
    """
    try:
        return build_whole_plan(own, model, call, backend, dynamic)
    except CaptureError as error:
        logger.info("%s is planned in parts: %s", type(model).__name__, error)
    with sources_forgotten() as kept:
        planned = _plan_children(own, call, tensors_by_name(model), backend, dynamic)
        kept.append(planned.module)
    return _plan_of(planned, None, own, model, call)


def build_whole_plan(
    own: nn.Module, model: nn.Module, call: Call, backend: str, dynamic: bool = True
) -> Plan:
    """As `build_plan`, but as one graph or not at all.

    Raises:
        CaptureError: the model cannot be captured as a whole; the message says why. AccelerationError: as there.
    """
    with sources_forgotten() as kept:
        program = capture_watched(own, call, dynamic)
        example = _example_of(own, call, program)
        planned = _plan_program(program, example, tensors_by_name(model), backend)
        kept.append(planned.module)
    return _plan_of(planned, program, own, model, call)


def _plan_of(planned: Planned, program: Program | None, own: nn.Module, model: nn.Module, call: Call) -> Plan:
    dtype = main_dtype(own)
    assert dtype is not None
    return Plan(
        planned.module,
        tuple(planned.entries),
        model=type(model).__name__,
        dtype=dtype,
        example=tuple((tuple(x.shape), x.dtype) for x in call.tensors),
        source=ModelSource.of(model),
        signature=signature_of(model),
        tree=call.tree,
        form=None if program is None else program.form(),
        outputs=None if program is None else program.outputs,
        writes_inputs=program is None or program.writes_inputs,
    )


def capture_watched(model: nn.Module, call: Call, dynamic: bool = True) -> Program:
    """As `capture`, but a model with hooks is refused: what they do is not in a graph."""
    watched = next((name or "the model" for name, m in model.named_modules() if _is_watched(m)), None)
    if watched is not None:
        raise CaptureError(f"{watched} has hooks")
    return capture(model, call, dynamic)


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Example(NamedTuple):
    """What a model gives for an example, as `flatten` takes it apart."""

    outputs: list[Any]
    tree: Tree


def _example_of(model: nn.Module, call: Call, program: Program) -> _Example:
    """What the model gives for the call that its program was captured from.

    Raises CaptureError where the program gives something else: a model may ask whether it is being captured, and
    compute otherwise then.
    """
    with torch.no_grad():
        args, kwargs = call.on_clones().arguments()
        outputs, tree = flatten(model(*args, **kwargs), once=True)
        try:
            given = program.graph(*call.on_clones().tensors)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise CaptureError(f"what PyTorch captures of it does not run: {error}") from error
    for ours, theirs in pairs_of_leaves(
        program.outputs, tree
    ):  # what is a plain number in a run may be a leaf there
        result, reference = given[ours], outputs[theirs]
        if not isinstance(result, Tensor) or not isinstance(reference, Tensor):
            continue
        error = relative_error(result, reference)
        if not error <= TOLERANCE.get(reference.dtype, TOLERANCE[torch.float32]):
            raise CaptureError(
                f"what PyTorch captures of it gives something else, by {error:.1e} of the largest output: does it ask "
                "torch.compiler.is_compiling(), or whether it is traced?"
            )
    return _Example(outputs, tree)


def _plan_program(
    program: Program,
    example: _Example,
    exact: Mapping[str, Tensor],
    backend: str,
    prefix: str = "",
) -> Planned:
    """The plan of a program.

    Args:
        example: what the model gives for the call that it was captured from.
        exact: the model's own tensors by name, where those of the program have fewer digits. prefix: of the names.
    """
    graph = copy_of(program.graph)
    for node in graph.graph.nodes:
        own = (
            exact.get(f"{prefix}.{node.target}" if prefix else node.target) if node.op == "get_attr" else None
        )
        read = aten.value_of(node)
        if (
            own is not None
            and read is not None
            and own.dtype != read.dtype
            and own.shape == tuple(read.shape)
        ):
            node.meta["exact"] = own
    simplify(graph)
    fuse(graph, backend)
    moves.collapse(graph)
    _keep_layouts(graph, program.outputs, example)
    output = graph.graph.output_node()
    (values,) = output.args
    if len(values) == 1:
        output.args = (values[0],)
    graph = own_tensors(graph)
    for node in graph.graph.nodes:
        node.meta.pop("exact", None)
    graph.recompile()
    return Planned(graph, _entries(graph))


def copy_of(graph: fx.GraphModule) -> fx.GraphModule:
    """The same nodes by the same names, which read the same tensors."""
    twin = fx.GraphModule(graph, fx.Graph())
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        mapping[node] = twin.graph.node_copy(node, lambda n: mapping[n])
        mapping[node].name = node.name
    read = {node.target: None for node in graph.graph.nodes if node.op == "get_attr"}
    values: dict[str, Any] = {}
    for target in read:
        value: Any = graph
        for name in target.split("."):
            value = getattr(value, name)
        values[target] = value
    return fx.GraphModule(values, twin.graph, "Plan")


def _keep_layouts(plan: fx.GraphModule, outputs: Tree, example: _Example) -> None:
    """Outputs lie in memory as the model's do in an example: a fused convolution's lie in channels_last."""
    output = plan.graph.output_node()
    values = list(output.args[0])
    if not any(len(aten.shape_of(value) or ()) > 2 for value in values):
        return
    places = dict(pairs_of_leaves(outputs, example.tree))
    with plan.graph.inserting_before(output):
        for index, value in enumerate(values):
            layout = _layout(example.outputs[places[index]]) if index in places else None
            if layout is None or len(aten.shape_of(value) or ()) < 3 or not _may_lie_otherwise(value):
                continue
            node = plan.graph.call_function(
                torch.ops.aten.contiguous.default, (value,), {"memory_format": layout}
            )
            node.meta = {key: value.meta[key] for key in ("val", "value_of") if key in value.meta}
            node.meta["path"] = ""
            values[index] = node
    output.args = (tuple(values),)


def _layout(x: object) -> torch.memory_format | None:
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return None
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _may_lie_otherwise(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "get_attr")


# Nodes that compute nothing: the report leaves them out.
_VIEWS_WORDS = """
    view reshape permute transpose t flatten unbind expand unflatten squeeze unsqueeze chunk split
    split_with_sizes contiguous select slice alias detach sym_size sym_numel sym_stride _assert_scalar
    _assert_async unsafe_chunk movedim expand_as view_as narrow
"""
_VIEWS = frozenset(_VIEWS_WORDS.split())


def _entries(graph: fx.GraphModule) -> list[Entry]:
    entries = []
    for node in graph.graph.nodes:
        origin = origin_of(node)
        path, *others = origin.paths
        absorbed = tuple(dict.fromkeys(other for other in others if other))
        if node.op == "call_module":
            module = module_of(node)
            assert isinstance(module, FusedModule)
            epilogue = module.epilogue() + (" + residual" if len(node.args) > 1 else "")
            entry = Entry(path, type(module).__name__, "", epilogue, absorbed, True, node.target)
        elif node.op == "call_function" and not aten.is_number(node) and aten.item_of(node) is None:
            name = aten.name_of(node) or getattr(node.target, "__name__", str(node.target))
            if name in _VIEWS:
                continue
            entry = Entry(path, name, "eager", "", absorbed, False)
        else:
            continue
        entries.append(entry.of_node(node.name, origin.nodes))
    return entries


def _plan_children(
    model: nn.Module, call: Call, exact: Mapping[str, Tensor], backend: str, dynamic: bool
) -> Planned:
    """The model with its children planned, as far as it still runs then and these have something to fuse."""
    calls = record_calls(model, call)
    planned = copy.deepcopy(model)
    entries = _replace_children(planned, "", model, calls, exact, backend, dynamic)
    return Planned(planned, entries or [Entry("", type(model).__name__, "eager", "", (), False)])


def record_calls(model: nn.Module, call: Call) -> dict[nn.Module, list[tuple[tuple, dict]]]:
    """The arguments of every call of every submodule in one run."""
    calls: dict[nn.Module, list[tuple[tuple, dict]]] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.setdefault(module, []).append((args, kwargs))

    python = [
        m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)
    ]  # others take no such hooks
    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in python]
    try:
        with torch.no_grad():
            args, kwargs = call.on_clones().arguments()
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _replace(
    parent: nn.Module,
    name: str,
    path: str,
    child: nn.Module,
    calls: dict[nn.Module, list[tuple[tuple, dict]]],
    exact: Mapping[str, Tensor],
    backend: str,
    dynamic: bool,
) -> list[Entry]:
    """Put a plan in the place of `parent.name`, or of the children below it where that cannot be planned."""
    seen = calls.get(child, [])
    if seen and isinstance(getattr(parent, name, None), nn.Module):
        try:
            signature = signature_of(child)
            call = Call.of(*signature.bind(*seen[0])).on_clones()
            program = capture_watched(child, call, dynamic)
            example = _example_of(child, call, program)
        except (AccelerationError, TypeError) as error:
            logger.info("%s is planned in parts: %s", path, error)
        else:
            graph, found = _plan_program(program, example, exact, backend, path)
            if any(entry.fused for entry in found) and not program.writes_inputs:
                original = getattr(parent, name)
                part = PlannedPart(graph, program.form(), program.outputs, signature, original)
                setattr(parent, name, part)
                return [entry.inside(path) for entry in found]
    entries = _replace_children(getattr(parent, name), path, child, calls, exact, backend, dynamic)
    if entries or not seen:
        return entries
    return [Entry(path, type(child).__name__, "eager", "", (), False)]


def _replace_children(
    planned: nn.Module,
    path: str,
    module: nn.Module,
    calls: dict[nn.Module, list[tuple[tuple, dict]]],
    exact: Mapping[str, Tensor],
    backend: str,
    dynamic: bool,
) -> list[Entry]:
    """Plan the children of `planned`, a copy of `module`, as far as it still runs then; [] where it stays as it was."""
    entries = []
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        entries += _replace(planned, name, inner, child, calls, exact, backend, dynamic)
    seen = calls.get(module, [])
    if not seen or not any(entry.fused for entry in entries):
        return entries
    try:
        with torch.no_grad():
            args, kwargs = Call.of(*seen[0]).on_clones().arguments()
            planned(*args, **kwargs)
    except Exception as error:  # whatever the module's own Python raises where its children are others
        logger.info("%s does not run with planned children (%s): it stays", path or "the model", error)
        _put_back(planned)
        return []
    return entries


def _put_back(planned: nn.Module) -> None:
    """The modules themselves in the place of their plans."""
    for name, child in planned.named_children():
        if isinstance(child, PlannedPart):
            assert child.original is not None
            setattr(planned, name, child.original)
        else:
            _put_back(child)
