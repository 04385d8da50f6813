"""`AcceleratedModel`: a plan that checks its inputs, runs without autograd, and reports what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.checking.report import Report
from depthfuse.acceleration.running.cuda_graphs import GraphCache
from depthfuse.acceleration.running.execution import Execution
from depthfuse.acceleration.running.implementations import run_in_chunks
from depthfuse.fused.layers import FusedModule, plain_ops
from depthfuse.spec import ModelSource

# Beyond this a value may overflow inside the net, and what then turns into NaN has to come out as NaN.
_LARGE = 1e6


class AcceleratedModel(nn.Module):
    """The result of `depthfuse.accelerate`: call it as you called the model. Not trainable.

    Inputs of another floating-point dtype are cast to the plan's; other memory formats, batch sizes and image sizes
    that the model takes are fine. Where a compiled copy for one input shape was faster, inputs of that shape run it;
    where the model itself was faster than its plan, a copy of it runs (`eager`). On a GPU the plan's launches are
    captured for each input shape, and replayed. All of these hold weights of their own, and are dropped, so that the
    plan runs, whenever the plan's weights are moved, cast or loaded, and in copies.
    """

    _compiled: Callable[..., Any] | None
    _compiled_for: tuple[tuple[int, ...], ...]
    _eager: Callable[..., Any] | None
    _graphs: GraphCache | None

    def __init__(
        self,
        plan: nn.Module,
        dtype: torch.dtype,
        in_channels: int | None,
        report: Report,
        example: tuple[tuple[tuple[int, ...], torch.dtype], ...],
        source: ModelSource | None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.dtype = dtype
        self.device = next(t.device for t in [*plan.parameters(), *plan.buffers()])
        self.in_channels = in_channels
        self.chunk: int | None = None  # how many images run at a time; None for all
        self.example = example  # shapes and dtypes of the inputs that the plan was made and tuned for
        self.source = source  # how timm builds the model that this was made from, as far as that is known
        self.execution = Execution()
        self._report = report
        self._drop_copies()
        self.register_load_state_dict_post_hook(_after_load)
        self.eval()

    def set_report(self, report: Report) -> None:
        """What `report` gives from now on."""
        self._report = report

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
        from depthfuse.acceleration.checking.profile import profile_entries  # it needs what needs this

        inputs = tuple(self._check(x) for x in inputs)
        entries = profile_entries(self.plan, self._report.entries, inputs, model, passes)
        return replace(self._report, entries=entries)

    def save(self, path: str | Path) -> None:
        """Write the plan and its tensors to one safetensors file, atomically; `depthfuse.load_accelerated` reads it.

        Where the model itself was faster than its plan, the plan is what is saved.

        Raises:
            AccelerationError: the plan holds what only the model's own code can build, and timm does not build the
                same; the error names it. CheckpointError: the file cannot be written; what stood there stays.
        """
        from depthfuse.acceleration.saving.saved import save_accelerated  # it needs what needs this

        save_accelerated(self, path)

    def train(self, mode: bool = True) -> AcceleratedModel:
        """Stays in evaluation mode. Raises RuntimeError for mode=True: train the model it was made from."""
        if mode:
            raise RuntimeError("an accelerated model cannot be trained: train the model it was made from")
        return super().train(False)

    def set_compiled(self, compiled: Callable[..., object], inputs: tuple[Tensor, ...]) -> None:
        """Run `compiled` for inputs of these shapes. Like oneDNN's, its ReLU may turn NaN into a number."""
        # Its bound method, because a module would become a submodule and be saved with this one.
        self._compiled = getattr(compiled, "forward", compiled)
        self._compiled_for = tuple(tuple(x.shape) for x in inputs)

    def set_eager(self, model: nn.Module) -> None:
        """Run `model`, for all inputs."""
        self._drop_copies()
        self._eager = model.__call__  # bound, for the same reason

    def use_graphs(self, batchwise: bool) -> None:
        """On a GPU: replay the plan's launches as one graph for each input shape; see `GraphCache` for `batchwise`."""
        self._graphs = GraphCache(self.plan, batchwise)

    def _drop_copies(self) -> None:
        # They hold weights of their own, which no longer are the plan's.
        self._compiled, self._compiled_for, self._eager, self._graphs = None, (), None, None

    def _apply(self, fn, recurse: bool = True):
        self._drop_copies()
        super()._apply(fn, recurse)
        tensor = next(t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point())
        self.dtype, self.device = tensor.dtype, tensor.device
        return self

    def __getstate__(self):
        return {
            **super().__getstate__(),
            "_compiled": None,
            "_compiled_for": (),
            "_eager": None,
            "_graphs": None,
        }

    def forward(self, *inputs: Tensor) -> Any:
        """Run the plan. Raises TypeError or ValueError for inputs that the model could not take either."""
        if not inputs:
            raise TypeError("expected at least one input tensor, got none")
        inputs = tuple(self._check(x) for x in inputs)
        with torch.no_grad():
            if torch.compiler.is_compiling():
                return self.plan(*inputs)
            if self._eager is not None:
                return self._eager(*inputs)
            # On a CPU only: nothing there swallows NaN on a GPU, and looking would wait for it.
            if self.device.type == "cpu" and not all(map(_is_tame, inputs)) and self._swallows_nan():
                with plain_ops():
                    return self.plan(*inputs)
            if self.chunk is not None and inputs[0].shape[0] > self.chunk:
                return run_in_chunks(self._run, inputs, self.chunk)
            return self._run(*inputs)

    def _run(self, *inputs: Tensor) -> Any:
        if self._compiled is not None and tuple(tuple(x.shape) for x in inputs) == self._compiled_for:
            return self._compiled(*inputs)
        return self.plan(*inputs) if self._graphs is None else self._graphs(*inputs)

    def _swallows_nan(self) -> bool:
        fused = (m for m in self.plan.modules() if isinstance(m, FusedModule))
        return self._compiled is not None or any(m.swallows_nan() for m in fused)

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
        if self.in_channels is not None and (x.dim() != 4 or x.shape[1] != self.in_channels):
            raise ValueError(f"input has shape {list(x.shape)}, expected [N, {self.in_channels}, H, W]")
        return x if x.dtype == self.dtype else x.to(self.dtype)


def _after_load(module: AcceleratedModel, _incompatible: object) -> None:
    module._drop_copies()


def _is_tame(x: Tensor) -> bool:
    """Whether all values are finite and none is huge (NaN fails every comparison)."""
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return bool((low > -_LARGE) & (high < _LARGE))
