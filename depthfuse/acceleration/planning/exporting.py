"""What torch.export does beside what it is for, kept from others: contexts to export in.

It changes PyTorch for the whole process while it runs, and reasons about sizes for longer than anybody waits.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import _trace
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class TooLongFormula(Exception):
    """A model's sizes depend on each other in formulas that take minutes to reason about."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What other threads run is none of export's business, and the advice for those who call it themselves is not ours
    to pass on.

    Export sends every call of every module through its tracer, and says to whoever asks that the process is exporting:
    models answer that with other operators.
    """
    thread = threading.get_ident()
    names = ("torch.export", "torch._export", "torch.fx.experimental", "torch._subclasses")
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    with contextlib.ExitStack() as stack:
        for tracer in (proxy_tensor.PythonKeyTracer, proxy_tensor._ModuleStackTracer):
            for name, of_others in (("call_module", _call), ("getattr", _value)):
                if name in vars(tracer):
                    own = _by_thread(thread, vars(tracer)[name], of_others)
                    stack.enter_context(mock.patch.object(tracer, name, own))
        if hasattr(
            _trace, "_ignore_backend_decomps"
        ):  # turns oneDNN off, for operators that nobody runs here
            stack.enter_context(mock.patch.object(_trace, "_ignore_backend_decomps", contextlib.nullcontext))
        for name in ("is_exporting", "is_compiling"):
            if hasattr(torch.compiler, name):
                own = _by_thread(thread, getattr(torch.compiler, name), _no)
                stack.enter_context(mock.patch.object(torch.compiler, name, own))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)


def _by_thread(
    thread: int, function: Callable[..., Any], of_others: Callable[..., Any]
) -> Callable[..., Any]:
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == thread else of_others)(*args, **kwargs)

    return chosen


def _call(tracer: object, module: object, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    return forward(*args, **kwargs)


def _value(tracer: object, name: str, value: Any, cache: object) -> Any:
    return value


def _no() -> bool:
    return False


@contextlib.contextmanager
def any_layout() -> Iterator[None]:
    """Keep convolutions from asking for the batch size: which library would run them, and in which memory layout it
    would leave its result, is of no interest here, but the answer would count as a condition of the program. Nor is the
    layout that each value has, which takes a quarter of the time to find out where sizes are open.
    """
    with contextlib.ExitStack() as stack:
        if hasattr(proxy_tensor, "_extract_tensor_metadata"):
            usual = proxy_tensor._extract_tensor_metadata
            none = _by_thread(threading.get_ident(), _none, usual)
            stack.enter_context(mock.patch.object(proxy_tensor, "_extract_tensor_metadata", none))
        for name in ("_select_conv_backend", "_conv_determine_backend_memory_format"):
            if hasattr(torch._C, name):
                stack.enter_context(mock.patch.object(torch._C, name, _none))
        yield


def _none(*args: Any, **kwargs: Any) -> None:
    return None


@contextlib.contextmanager
def short_formulas(longest: int) -> Iterator[None]:
    """Raise TooLongFormula where a condition of sizes has more than `longest` operations."""
    evaluate = ShapeEnv.evaluate_expr

    def bounded(self: ShapeEnv, expression: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(expression, "count_ops", int)() > longest:
            raise TooLongFormula(f"it asks whether {str(expression)[:80]}...")
        return evaluate(self, expression, *args, **kwargs)

    with mock.patch.object(ShapeEnv, "evaluate_expr", bounded):
        yield


# Their value is like their input. Export finds that out by taking them apart, a third of its time where sizes are open.
_ACTIVATIONS = "hardtanh elu leaky_relu silu gelu mish hardswish hardsigmoid sigmoid tanh softplus"


@contextlib.contextmanager
def known_shapes() -> Iterator[None]:
    """Tell export what activations, and batch norms by fixed statistics, give."""
    if not hasattr(fake_impls, "get_fast_op_impls"):
        yield  # another version of PyTorch's, which takes its time
        return
    known: dict[Any, Callable[..., Any]] = {}
    for name in _ACTIVATIONS.split():
        for packet in (getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_", None)):
            usual = None if packet is None else decomposition_table.get(packet.default)
            if usual is not None:
                known[packet.default] = functools.partial(_activation, usual, packet.default)
    training = torch.ops.aten.native_batch_norm.default
    known[training] = functools.partial(_batch_norm, decomposition_table[training])
    fixed = torch.ops.aten._native_batch_norm_legit_no_training.default
    known[fixed] = functools.partial(_fixed_batch_norm, decomposition_table[fixed])
    with mock.patch.dict(fake_impls.get_fast_op_impls(), known):
        yield


def _activation(
    usual: Callable[..., Any], operator: Any, mode: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if not x.is_floating_point() or _is_expanded(x):
        with mode:
            return usual(x, *args, **kwargs)
    return x if operator._schema.is_mutable else _like(mode, x)


def _batch_norm(usual: Callable[..., Any], mode: Any, x: Tensor, *args: Any) -> Any:
    *parameters, training, _momentum, _eps = args
    if training or not _is_plain_norm(x, parameters):
        with mode:
            return usual(x, *args)
    none = x.new_empty(0)
    return _like(mode, x), none, none


def _fixed_batch_norm(usual: Callable[..., Any], mode: Any, x: Tensor, *args: Any) -> Any:
    *parameters, _momentum, _eps = args
    if not _is_plain_norm(x, parameters):
        with mode:
            return usual(x, *args)
    none = x.new_empty(0)
    return _like(mode, x), none, none


def _is_plain_norm(x: Tensor, parameters: list[Tensor | None]) -> bool:
    return not _is_expanded(x) and all(t is None or t.dtype == x.dtype for t in parameters)


def _is_expanded(x: Tensor) -> bool:
    return any(isinstance(stride, int) and stride == 0 for stride in x.stride())


def _like(mode: Any, x: Tensor) -> FakeTensor:
    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return FakeTensor(mode, empty, device=x.device)
