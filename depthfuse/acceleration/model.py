"""`AcceleratedModel`: a plan that checks its inputs, runs without autograd, and reports what it is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.checking.profile import profile_entries
from depthfuse.acceleration.checking.report import Report
from depthfuse.acceleration.planning.plan import Plan
from depthfuse.acceleration.running.execution import Executor
from depthfuse.acceleration.saving.saved import save_plan
from depthfuse.merging.tracing import one_at_a_time


class AcceleratedModel(nn.Module):
    """The result of `depthfuse.accelerate`: call it as you called the model. Not trainable.

    It is built last, from what planning, choosing and checking gave, and nothing is set in it afterwards. Inputs of
    another floating-point dtype are cast to the plan's; other memory formats, batch sizes and image sizes that the
    model takes are fine. Where a compiled copy for one input shape was faster, inputs of that shape run it; where the
    model itself was faster than its plan, a copy of it runs. On a GPU the plan's launches are captured for each input
    shape, and replayed. All of these hold weights of their own, and are dropped, so that the plan runs alone, whenever
    the plan's weights are moved, cast or loaded, and in copies; the report then says so.

    plan: the module that runs, with the weights.
    """

    def __init__(self, plan: Plan, executor: Executor, report: Report) -> None:
        super().__init__()
        self.plan = plan.module
        self._made = plan
        self._device = plan.device
        self._executor = executor
        self._report = report
        self.register_load_state_dict_post_hook(_after_load)
        self.eval()

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

    def profile(self, *inputs: Tensor, model: nn.Module | None = None, passes: int = 10) -> Report:
        """The report with what each operation costs on `inputs`; takes a few runs of the model op by op.

        Args:
            inputs: as for a call. model: what this was made from, for the latencies of its layers; None leaves those
                out. passes: how often everything runs; the least time of each operation counts.

        Returns:
            A Report whose entries have a `Cost`: latency before and after in ms, multiply-accumulates, bytes moved,
            and the roofline's time, by `depthfuse.measuring.roofline.peaks_of`.

        Raises:
            TypeError, ValueError: inputs that do not fit; a model that is not the one this was made from.
        """
        inputs = tuple(self._check(x) for x in inputs)
        with one_at_a_time:
            entries = profile_entries(self.plan, self._report.entries, inputs, model, passes)
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

    def _leave_plan_alone(self) -> None:
        """After the weights were touched: the plan alone runs, and nothing that was found before is said of it."""
        self._executor = self._executor.alone()
        self._report = replace(
            self._report,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            entries=self._made.named_entries(),
            executor=self._executor.in_words(),
            max_relative_error=None,
            latency_ms={},
            ratios={},
        )

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        tensor = next(t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point())
        self._made = replace(self._made, dtype=tensor.dtype)
        self._device = tensor.device
        self._leave_plan_alone()
        return self

    def __getstate__(self):
        # A copy's modules have dropped their bindings, too.
        return {**super().__getstate__(), "_executor": self._executor.alone()}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._leave_plan_alone()

    def forward(self, *inputs: Tensor) -> Any:
        """Run the plan. Raises TypeError or ValueError for inputs that the model could not take either."""
        if not inputs:
            raise TypeError("expected at least one input tensor, got none")
        inputs = tuple(self._check(x) for x in inputs)
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return self.plan(*inputs)
        return self._executor(*inputs)

    def _check(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(
                f"input has dtype {x.dtype}, expected {self.dtype} (or another floating-point dtype, "
                "which is cast); convert images to floating point and normalise them first"
            )
        if x.device != self.device:
            raise ValueError(
                f"input is on {x.device}, expected {self.device}: move it there, or the accelerated model to it"
            )
        channels = self._made.in_channels
        if channels is not None and (x.dim() != 4 or x.shape[1] != channels):
            raise ValueError(f"input has shape {list(x.shape)}, expected [N, {channels}, H, W]")
        return x if x.dtype == self.dtype else x.to(self.dtype)


def _after_load(module: AcceleratedModel, _incompatible: object) -> None:
    module._leave_plan_alone()
