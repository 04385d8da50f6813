"""How a plan runs as a whole: the choice as a value, and what carries it out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from depthfuse.acceleration.planning.part import as_tuple
from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.planning.trees import Leaf, unflatten
from depthfuse.acceleration.running.cuda_graphs import GraphCache
from depthfuse.acceleration.running.implementations import run_in_chunks
from depthfuse.acceleration.running.native_engine import NativeCallable
from depthfuse.acceleration.running.other_engines import OTHER_ENGINES
from depthfuse.acceleration.running.shortcut import Shortcut
from depthfuse.fused.layers import plain_ops
from depthfuse.native.values import all_within
from depthfuse.untrusted import is_out_of_memory

EAGER = ("eager", "eager channels_last")
# What may run a whole plan on a CPU, for one shape, beside OTHER_ENGINES.
ONEDNN, NATIVE = "oneDNN Graph", "native engine"
OP_BY_OP = "op by op"
# Beyond this a value may overflow inside the net, and what then turns into NaN has to come out as NaN.
_LARGE = 1e6


@dataclass(frozen=True)
class Execution:
    """The choice and what it rests on.

    chunk: how many images run at a time, None for all. compiled: the engine that runs the plan for the example's
    shapes, if any. engines: each engine's time, and OP_BY_OP's for none, over that of what was chosen among them.
    failed: why another project's engine, which was tried, does not run the plan.
    eager: "eager" or "eager channels_last" where the model itself runs. graphs: whether launches are replayed as graphs
    (on a GPU). exact: whether Winograd, which rounds more than a sum does, is ruled out. latency_ms: of the plan and of
    the model in each layout, on the example input; empty where nothing was compared. ratios: each layout's time over
    the plan's, medians of interleaved rounds.

    Raises TypeError or ValueError for values that make no sense, as a damaged or crafted file may hold them.
    """

    chunk: int | None = None
    compiled: str | None = None
    eager: str | None = None
    graphs: bool = False
    exact: bool = False
    engines: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chunk is not None and (type(self.chunk) is not int or self.chunk < 1):
            raise ValueError(f"chunk is {self.chunk!r}, expected a number of images of at least 1, or none")
        engines = (ONEDNN, NATIVE, *OTHER_ENGINES)
        if self.compiled not in (None, *engines):
            raise ValueError(f"compiled is {self.compiled!r}, expected one of {', '.join(engines)}, or none")
        for name in ("graphs", "exact"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if self.eager is not None and self.eager not in EAGER:
            raise ValueError(f"eager is {self.eager!r}, expected one of {', '.join(EAGER)}, or none")
        for name in ("engines", "latency_ms", "ratios"):
            numbers = getattr(self, name)
            if not isinstance(numbers, dict) or not all(
                isinstance(key, str) and type(value) in (int, float) and 0 < value < float("inf")
                for key, value in numbers.items()
            ):
                raise ValueError(f"{name} is {numbers!r}, expected a positive number for each name")
        failed = self.failed
        if not isinstance(failed, dict) or not all(
            isinstance(word, str) for word in (*failed, *failed.values())
        ):
            raise ValueError(f"failed is {failed!r}, expected a reason for each name")
        if self.eager is not None and self.eager not in self.ratios:
            raise ValueError(f"{self.eager!r} is chosen, but no ratio of it is known")

    def document(self) -> dict[str, Any]:
        """As JSON for the cache."""
        return dict(vars(self))

    @classmethod
    def from_document(cls, document: Any) -> Execution | None:
        """From the cache, or None where that holds anything else."""
        if not isinstance(document, dict) or set(document) != {f.name for f in fields(cls)}:
            return None
        try:
            return cls(**document)
        except (TypeError, ValueError):
            return None

    def part(self, call: Call) -> Call:
        """What of `call` runs at a time."""
        return (
            call
            if self.chunk is None
            else replace(call, tensors=tuple(x[: self.chunk] for x in call.tensors))
        )


def run_plan(plan: Plan, call: Call) -> Any:
    """Run a plan's module as it is, with nothing chosen around it; `call` is one that it takes."""
    if plan.outputs is not None:
        return unflatten(as_tuple(plan.module(*call.tensors)), plan.outputs)
    args, kwargs = call.arguments()
    return plan.module(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Executor:
    """Carries out an execution; call it with a call that the plan takes, in its dtypes, on its device.

    What it holds beside the plan's module has weights of its own (`compiled`, `eager`) or is bound to where the
    module's weights lie (`graphs`): `alone` is what is left when these are moved, cast, loaded or copied.

    compiled: a copy of the plan's graph for inputs of exactly the shapes `compiled_for`, and for as many threads as
    `compiled_threads`, None for any; oneDNN's ReLU may turn NaN into a number, the engine's Winograd spreads it to
    neighbours, and of others' engines we do not know. eager: the model itself, for all calls.
    graphs: replays, on a GPU.
    """

    plan: Plan
    execution: Execution = Execution()
    compiled: Callable[..., Any] | None = None
    compiled_for: tuple[tuple[int, ...], ...] = ()
    compiled_threads: int | None = None
    eager: Callable[..., Any] | None = None
    graphs: GraphCache | None = None

    def alone(self) -> Executor:
        """The plan alone, as many images at a time as before."""
        return Executor(self.plan, Execution(chunk=self.execution.chunk, exact=self.execution.exact))

    @property
    def whole(self) -> str | None:
        """What computes all operations in the place of their own implementations, for the example's shapes; None where
        these do.
        """
        if self.eager is not None:
            return self.execution.eager
        return None if self.compiled is None else self.execution.compiled

    def in_words(self) -> str:
        """What runs, for the report."""
        choice = self.execution
        if self.eager is not None and choice.eager is not None:
            ratio = choice.ratios[choice.eager]
            return f"{choice.eager}: the model itself, whose time was {ratio:.2f} of the plan's"
        text = "op by op" if self.graphs is None else "one graph for each input shape"
        if self.compiled is not None:
            shapes = " and ".join(str(list(shape)) for shape in self.compiled_for)
            threads = "" if self.compiled_threads is None else f" and {self.compiled_threads} threads"
            text = f"{choice.compiled} for {shapes}{threads}, op by op for other shapes"
        return text if choice.chunk is None else f"{text}, {choice.chunk} images at a time"

    @functools.cached_property
    def shortcut(self) -> Shortcut | None:
        """For calls with one tensor of the example's shape, and nothing else; None where there is more to them."""
        plan, engine = self.plan, self.compiled
        if not isinstance(engine, NativeCallable) or self.eager is not None or len(self.compiled_for) != 1:
            return None
        (shape,) = self.compiled_for
        try:
            example = torch.empty(shape, dtype=engine.dtype, device="cpu")
            call = Call.of(*plan.signature.bind((example,), {}))
        except TypeError:  # it takes more
            return None
        chunk = self.execution.chunk
        whole = chunk is None or shape[0] <= chunk
        plain = plan.form is not None and plan.form.layouts is None and plan.form.takes(call)
        is_usual = engine.single and plan.outputs == Leaf(0)
        if not (whole and plain and is_usual) or plan.makes_nan or plan.writes_inputs:
            return None
        return Shortcut(engine.plan, engine.dtype, torch.Size(shape), torch.Size(engine.shapes[0]), _LARGE)

    def engine_for(self, call: Call) -> NativeCallable | None:
        """The native engine's plan, where that runs the whole of such a call."""
        engine = self.compiled
        shapes = tuple(tuple(x.shape) for x in call.tensors)
        if (
            not isinstance(engine, NativeCallable)
            or self.eager is not None
            or not self._is_compiled_for(shapes)
        ):
            return None
        return engine

    @torch.no_grad()
    def __call__(self, call: Call) -> Any:
        if self.eager is not None:
            args, kwargs = call.arguments()
            try:
                return self.eager(*args, **kwargs)
            except RuntimeError as error:
                # In channels_last a `view` may not take what it took at the example's sizes; the plan has no views.
                if self.execution.eager != EAGER[1] or self.plan.writes_inputs or is_out_of_memory(error):
                    raise
        # Kernels read memory, where the sign of these is not; who writes to one must have the tensor itself.
        if not self.plan.writes_inputs and any(x.is_neg() for x in call.tensors):
            call = replace(call, tensors=tuple(x.resolve_neg() for x in call.tensors))
        # On a CPU only: nothing there swallows NaN on a GPU, and looking would wait for it.
        on_cpu = all(x.device.type == "cpu" for x in call.tensors)
        if on_cpu and self._swallows_nan() and (self.plan.makes_nan or not all(map(_is_tame, call.tensors))):
            with plain_ops():
                return run_plan(self.plan, call)
        if self.plan.outputs is None:
            return run_plan(self.plan, call)
        chunk, tensors = self.execution.chunk, call.tensors
        if chunk is not None and tensors[0].shape[0] > chunk and self._takes_parts(call, chunk):
            outputs = run_in_chunks(self._run, tensors, chunk)
        else:
            outputs = self._run(*tensors)
        return unflatten(as_tuple(outputs), self.plan.outputs)

    def _takes_parts(self, call: Call, chunk: int) -> bool:
        """Whether the plan is right for `chunk` images, and for how many are left over."""
        form = self.plan.form
        sizes = {chunk, call.tensors[0].shape[0] % chunk or chunk}
        return form is not None and all(
            form.takes(replace(call, tensors=tuple(x[:size] for x in call.tensors))) for size in sizes
        )

    def _run(self, *tensors: Tensor) -> Any:
        if self.compiled is not None and self._is_compiled_for(tuple(tuple(x.shape) for x in tensors)):
            return self.compiled(*tensors)
        return self.plan.module(*tensors) if self.graphs is None else self.graphs(*tensors)

    def _is_compiled_for(self, shapes: tuple[tuple[int, ...], ...]) -> bool:
        return shapes == self.compiled_for and self.compiled_threads in (None, torch.get_num_threads())

    def _swallows_nan(self) -> bool:
        # The modules last: a plan may have hundreds, and this is asked at each call.
        return self.compiled is not None or any(m.swallows_nan() for m in self.plan.fused_modules().values())


def _is_tame(x: Tensor) -> bool:
    """Whether all values are finite and none is huge (NaN fails every comparison)."""
    if x.numel() == 0 or not x.is_floating_point():
        return True
    return all_within(x, _LARGE)
