"""A subject as PyTorch's exported program: its own operations and nothing that computes nothing."""

from __future__ import annotations

from torch import fx
from torch.export import Dim, ExportedProgram

from depthfuse.acceleration.planning.aten import name_of
from depthfuse.acceleration.running.conversion import in_own_operations, in_rows
from depthfuse.errors import ExportError
from depthfuse.exporting.subject import Subject
from depthfuse.untrusted import is_out_of_memory

_CHECKS = frozenset(("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"))


def clean_program(subject: Subject, largest_batch: int | None) -> ExportedProgram:
    """The program; sizes that are left open are named in it.

    Args:
        largest_batch: that it has to take; None for any.

    Raises:
        ExportError: PyTorch finds that a size is not open.
    """
    names = sorted({name for axes in subject.open_axes() for name in axes.values()})
    # sizes of images may have a least value, as a kernel has: PyTorch finds it
    dims = {"batch": Dim("batch", min=1, max=largest_batch), "height": Dim.DYNAMIC, "width": Dim.DYNAMIC}
    shapes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in subject.open_axes())
    inputs = tuple(x.detach().contiguous() for x in subject.call.tensors)
    try:
        program = in_own_operations(in_rows(subject.plan.module), inputs, shapes)
    except Exception as error:  # export raises whatever PyTorch or sympy do
        if is_out_of_memory(error):
            raise
        raise ExportError(
            f"{subject.name()} cannot be exported with {' and '.join(names) or 'these sizes'} open: "
            f"{reason_of(error)}; dynamic='none' exports it for the example's sizes alone"
        ) from error
    _tidy(program)
    return program


def reason_of(error: BaseException) -> str:
    """The innermost cause in one line: what converters raise first tells of their own stages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _tidy(program: ExportedProgram) -> None:
    """Take away what only tells of this machine, and let one open size in a reshape follow from the others."""
    graph = program.graph
    for node in list(graph.nodes):
        node.meta.pop("stack_trace", None)  # paths of files here
        if name_of(node) in _CHECKS:
            graph.erase_node(node)
        elif name_of(node) in ("view", "reshape"):
            x, shape, *rest = node.args
            if sum(isinstance(size, fx.Node) for size in shape) == 1 and -1 not in shape:
                node.args = (x, [-1 if isinstance(size, fx.Node) else size for size in shape], *rest)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
