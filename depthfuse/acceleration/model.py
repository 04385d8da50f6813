"""`AcceleratedModel`: a plan that checks its calls, runs without autograd, and reports what it is made of."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from depthfuse.acceleration.checking.profile import profile_entries
from depthfuse.acceleration.checking.report import Report
from depthfuse.acceleration.checking.verify import verify
from depthfuse.acceleration.planning.build import build_plan
from depthfuse.acceleration.planning.plan import Entry, Plan
from depthfuse.acceleration.planning.program import Call, layout_of
from depthfuse.acceleration.running.choose import choose, restore
from depthfuse.acceleration.running.execution import Execution, Executor, run_plan
from depthfuse.acceleration.saving.saved import save_plan
from depthfuse.errors import AccelerationError, DepthfuseError
from depthfuse.merging.tracing import one_at_a_time

logger = logging.getLogger(__name__)

_OTHER_PLANS = 4  # for calls that the first plan does not take; each has weights of its own
_KNOWN_CALLS = 1024


class AcceleratedModel(nn.Module):
    """The result of `depthfuse.accelerate`: call it as you called the model. Not trainable.

    It is built last, from what planning, choosing and checking gave. Inputs of another floating-point dtype are cast to
    the plan's. A call that the plan is not right for (another flag, another dtype of integers, a size that the model
    treats otherwise) runs a private copy of the model; up to four such kinds of calls get plans of their own, which
    take over from the second call on. Under autocast the private copy runs. A model that was loaded from a file has
    no such copy, and raises AccelerationError instead.

    Where a compiled copy for one input shape was faster, inputs of that shape run it; where the model itself was faster
    than its plan, a copy of it runs. On a GPU the plan's launches are captured for each input shape, and replayed. All
    of these hold weights of their own; they are dropped, so that the plan runs alone, whenever the plan's weights are
    moved, cast or loaded. Copies (`copy.deepcopy`, pickle) run what the original runs.

    plan: the module that runs, with the weights.
    """

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        report: Report,
        original: nn.Module | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.plan = plan.module
        self._made = plan
        self._device = plan.device  # of some weight, which each call would look for among all modules
        self._executor = executor
        self._report = report
        self._backend = backend
        # Not as a submodule: its weights are none of this model's.
        self.__dict__["_original"] = original
        self._others: list[Executor] = []
        self._refused: set[tuple] = set()
        self._known: dict[tuple, Executor] = {}
        self.register_load_state_dict_post_hook(_after_load)
        self.eval()

    @property
    def made(self) -> Plan:
        """The plan as a value: what runs, its operations, and the calls that it is right for."""
        return self._made

    @property
    def execution(self) -> Execution:
        """How the plan runs as a whole, and what that choice rests on."""
        return self._executor.execution

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and to which inputs are cast."""
        return self._made.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._device

    def report(self) -> Report:
        """Every operation: its path in the original model, what runs it, what was fused. `print` gives a table."""
        return self._report

    @property
    def runs_the_model(self) -> bool:
        """Whether a copy of the model runs, because that was faster than its plan."""
        return self._executor.eager is not None

    @property
    def original(self) -> nn.Module | None:
        """A private copy of what it was made from, in the plan's dtype; None where it was loaded from a file."""
        return self.__dict__["_original"]

    def verified(self, error: float | None, entries: tuple[Entry, ...]) -> AcceleratedModel:
        """The same with what was found when it was checked in its report."""
        self._report = replace(self._report, max_relative_error=error, entries=entries)
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights, frozen. They are buffers. Those of the plan's dtype come first: `next(model.parameters()).dtype`
        is what asks for them.
        """
        weights = list(super().named_parameters(prefix, recurse, remove_duplicate))
        for name, buffer in self.named_buffers(prefix, recurse, remove_duplicate):
            if buffer.is_floating_point():
                weights.append((name, nn.Parameter(buffer, requires_grad=False)))
        yield from sorted(weights, key=lambda named: named[1].dtype != self.dtype)

    def profile(self, *args: Any, model: nn.Module | None = None, passes: int = 10, **kwargs: Any) -> Report:
        """The report with what each operation costs in a call.

        Where the native engine runs the call, latencies are its own: the least of each, so that their sum is at most a
        call's. Elsewhere operations run one by one, to be told apart.

        Args:
            args, kwargs: as for a call. model: what this was made from, for the latencies of its layers; None leaves
                those out. passes: how often everything runs; the least time of each operation counts.

        Returns:
            A Report whose entries have a `Cost`: latency before and after in ms, multiply-accumulates, bytes moved,
            and the roofline's time, by `depthfuse.measuring.roofline.peaks_of`.

        Raises:
            TypeError, ValueError: inputs that do not fit; a model that is not the one this was made from.
        """
        call = self._call(args, kwargs)
        if self._made.form is not None and not self._made.form.takes(call):
            raise ValueError(
                f"the plan is not made for a call like {call}: its example was {self._example()}"
            )
        with one_at_a_time:
            engine = self._executor.engine_for(call)
            times = None if engine is None else engine.profile
            entries = profile_entries(self._made, self._report.entries, call, model, passes, times)
        return replace(self._report, entries=entries)

    def save(self, path: str | Path) -> None:
        """Write the plan and its tensors to one safetensors file, atomically; `depthfuse.load_accelerated` reads it.

        Where the model itself was faster than its plan, the plan is what is saved.

        Raises:
            AccelerationError: the plan holds what only the model's own code can build, and timm does not build the
                same; the error names it. CheckpointError: the file cannot be written; what stood there stays.
        """
        save_plan(path, self._made, self._executor.execution, self._report)

    def train(self, mode: bool = True) -> AcceleratedModel:
        """Stays in evaluation mode. Raises RuntimeError for mode=True: train the model it was made from."""
        if mode:
            raise RuntimeError("an accelerated model cannot be trained: train the model it was made from")
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model. Raises TypeError, ValueError or AccelerationError for a call that cannot be made here; the
        model's own errors come out as they are.
        """
        if len(args) == 1 and not kwargs and not torch.compiler.is_dynamo_compiling():
            shortcut = self._executor.shortcut
            output = None if shortcut is None else shortcut(args[0])
            if output is not None:
                return output
        call = self._call(args, kwargs)
        if torch.compiler.is_dynamo_compiling() or _are_traced(call):
            with torch.no_grad():
                return run_plan(self._made, call)
        executor = None if torch.is_autocast_enabled(self.device.type) else self._executor_for(call)
        return self._run_original(call) if executor is None else executor(call)

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        call = Call.of(*self._made.signature.bind(args, kwargs))
        for x in call.tensors:
            if x.device != self._device:
                raise ValueError(
                    f"input is on {x.device}, expected {self._device}: move it there, or the accelerated model to it"
                )
        return self._made.cast(call)

    def _executor_for(self, call: Call) -> Executor | None:
        """What is right for a call, or None."""
        key = self._key(call)
        known = self._known.get(key)
        if known is not None:
            return known
        for executor in (self._executor, *self._others):
            form = executor.plan.form
            if form is None or form.takes(call):
                if len(self._known) >= _KNOWN_CALLS:
                    self._known.clear()
                self._known[key] = executor
                return executor
        return None

    def _key(self, call: Call) -> tuple:
        """Equal for calls that the same plan is right for."""
        key = call.tree, tuple(x.dtype for x in call.tensors), call.shapes()
        if any(map(_asks_for_layouts, (self._executor, *self._others))):
            return *key, tuple(map(layout_of, call.tensors))
        return key

    @torch.no_grad()
    def _run_original(self, call: Call) -> Any:
        """Run the model itself, and plan for such calls from then on."""
        original = self.original
        if original is None:
            where = "under autocast" if torch.is_autocast_enabled(self.device.type) else f"a call like {call}"
            raise AccelerationError(
                f"no plan for {where}: the example was {self._example()}, and the model itself is not at hand in what "
                "was loaded; accelerate the model with such an example"
            )
        with torch.inference_mode(False):  # what is planned outlives the caller's inference mode
            before = call.on_clones()
        args, kwargs = call.arguments()
        outputs = original(*args, **kwargs)
        key = self._key(call)
        plannable = not torch.is_autocast_enabled(self.device.type) and key not in self._refused
        if plannable and len(self._others) < _OTHER_PLANS:
            self._plan_anew(original, before, key)
        return outputs

    def _plan_anew(self, original: nn.Module, call: Call, key: tuple) -> None:
        with one_at_a_time, torch.inference_mode(False), torch.no_grad():
            if self._executor_for(call) is not None:
                return  # another thread did
            try:
                plan = build_plan(original, original, call, self._backend)
                executor = choose(plan, None, call, "heuristic", exact=self._executor.execution.exact)
                ours = AcceleratedModel(plan, executor, self._report)
                verify(plan, ours, original, call)
            except (DepthfuseError, RuntimeError) as error:
                logger.info("the model itself runs calls like %s: %s", call, error)
                self._refused.add(key)
                return
            self._others.append(executor)

    def _example(self) -> str:
        empty = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in self._made.example)
        return str(Call(empty, self._made.tree))

    def _leave_plan_alone(self, executor: Executor) -> None:
        """After the weights were touched: the plan alone runs, and nothing that was found before is said of it."""
        self._device = self._made.device
        self._executor = executor
        self._others, self._refused, self._known = [], set(), {}
        self._report = replace(
            self._report,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            entries=self._made.named_entries(),
            executor=executor.in_words(),
            whole=executor.whole,
            max_relative_error=None,
            engines={},
            latency_ms={},
            ratios={},
        )

    def _apply(self, fn, recurse: bool = True):
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        original = self.original
        if probe.dtype != self.dtype:
            return self._cast(fn, original, probe.dtype)
        moved = probe.device != self.device
        super()._apply(fn, recurse)
        if original is not None:
            original._apply(fn)
        if moved:
            for module in self.plan.modules():
                if isinstance(module, fx.GraphModule):
                    _move_constants(module, probe.device)
        self._leave_plan_alone(self._executor.alone())
        return self

    def _cast(self, fn, original: nn.Module | None, dtype: torch.dtype) -> AcceleratedModel:
        """What computes in another dtype is another plan: casts that the model makes are part of it."""
        if original is None:
            raise AccelerationError(
                f"a loaded model stays in {self.dtype}: accelerate the model with dtype={dtype}, and save that"
            )
        original._apply(fn)
        tensors = tuple(fn(x) for x in self._made.example_call().tensors)
        call = Call(tensors, self._made.tree)
        self._made = replace(build_plan(original, original, call, self._backend), source=self._made.source)
        self.plan = self._made.module
        self._leave_plan_alone(Executor(self._made, Execution(exact=self._executor.execution.exact)))
        return self

    def __getstate__(self):
        # Replays, compiled copies and packed weights can be neither copied nor saved: their names are.
        names = {name: module.implementation() for name, module in self._made.fused_modules().items()}
        state = {**super().__getstate__(), "_known": {}, "_refused": set(), "_others": []}
        return {**state, "_executor": self._executor.alone(), "_chosen": (self._executor.execution, names)}

    def __setstate__(self, state):
        execution, names = state.pop("_chosen")
        super().__setstate__(state)
        self._device = self._made.device  # PyTorch may load it to another one
        try:
            with one_at_a_time:
                call = self._made.example_call()
                self._executor = restore(self._made, execution, call, names, self.original)
        except (DepthfuseError, RuntimeError, ValueError, KeyError) as error:  # as on another machine
            logger.info("a copy runs its plan op by op: %s", error)
            self._leave_plan_alone(Executor(self._made))
        self._report = replace(self._report, executor=self._executor.in_words(), whole=self._executor.whole)


def _are_traced(call: Call) -> bool:
    """Whether tensors only stand for others, as where somebody exports the accelerated model."""
    return not all(type(x) in (torch.Tensor, nn.Parameter) for x in call.tensors)


def _asks_for_layouts(executor: Executor) -> bool:
    return executor.plan.form is not None and executor.plan.form.layouts is not None


def _move_constants(graph: fx.GraphModule, device: torch.device) -> None:
    """Let the operators that make tensors make them on `device`."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    graph.recompile()


def _after_load(module: AcceleratedModel, _incompatible: object) -> None:
    module.__dict__["_original"] = None  # it has other weights
    module._leave_plan_alone(module._executor.alone())
