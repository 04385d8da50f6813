"""lambda in a training loop that is not ours: a plain one, Hugging Face's Trainer, Lightning."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any, get_args

from depthfuse.config import Schedule as Shape
from depthfuse.errors import ConfigError, SpecError
from depthfuse.merging.supernet import Supernet
from depthfuse.spec import KEEP
from depthfuse.training.lambda_schedule import lambda_at


class Schedule:
    """Moves the chosen blocks of a subnet from original (lambda = 1) to pruned (0) while somebody else trains it::

        schedule = depthfuse.Schedule(subnet, steps=1000)
        for images, labels in batches:
            ...  # loss, backward, optimizer.step()
            schedule.step()
        merged = depthfuse.merge(subnet.eval())

    Step i of `steps` is trained at `lambda_at(i / steps, shape, share)`, as by `depthfuse finetune` (UPDP, arXiv
    2401.06426, step 3): lambda falls over the first `share` of training, and is exactly 0 from there on. `for_trainer`
    and `for_lightning` give callbacks that read the progress off the trainer, so a run that goes on from the trainer's
    checkpoint has the lambda that it had; they take the number of steps from it, too, and `steps` is left out.

    The subnet is shared, not copied: give it to `Schedule` before DistributedDataParallel or accelerate's `prepare`
    wrap it. Such wrappers need `find_unused_parameters=True`, as a block at lambda = 1 does not use its merged form's
    parameters, and at 0 not all of its own. A moving average of the weights is a copy with a lambda of its own: call
    `average.set_lambda(schedule.lam)` before it is evaluated.

    Args:
        subnet: a `Supernet` with at least one chosen block. Its lambda is set at once, to that of the first step.
        steps: of the optimizer, at least 1, that training takes in all.
        shape: "cosine", "linear", or "none": 0 from the beginning.
        share: of training during which lambda falls, between 0 and 1, both excluded.

    Raises:
        SpecError: no Supernet, or one without a chosen block. ConfigError: steps, shape or share out of place.
    """

    def __init__(
        self, subnet: Supernet, steps: int | None = None, *, shape: Shape = "cosine", share: float = 0.4
    ) -> None:
        if not isinstance(subnet, Supernet):
            inside = " (its .module)" if isinstance(getattr(subnet, "module", None), Supernet) else ""
            raise SpecError(
                f"Schedule takes the depthfuse.Supernet that is trained, not {type(subnet).__name__}: give it the "
                f"subnet itself{inside}, which wrappers share"
            )
        if all(choice == KEEP for choice in subnet.choices().values()):
            raise SpecError(
                "no block of the subnet is chosen, so lambda would move nothing: call "
                "supernet.set_choices({block: candidate, ...}), of supernet.options(), and take "
                "supernet.subnet(supernet.spec())"
            )
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ConfigError(f"steps must be a whole number of optimizer steps, at least 1, not {steps!r}")
        if shape not in get_args(Shape):
            raise ConfigError(f"unknown shape {shape!r}; known: {', '.join(get_args(Shape))}")
        if not 0.0 < share < 1.0:
            raise ConfigError(
                f"share must lie between 0 and 1 (both excluded), not {share}: training must end at lambda = 0"
            )
        self.subnet, self.steps, self.shape, self.share = subnet, steps, shape, share
        self.done = 0
        self._set(0.0)

    @property
    def lam(self) -> float:
        """The subnet's lambda now."""
        return self._lam

    def step(self) -> None:
        """One step of the optimizer is done: set lambda for the next one. Past the last step it stays 0.

        Raises ConfigError where `Schedule` was not told how many steps there are.
        """
        self.done = min(self.done + 1, self._known_steps())
        self._set(self.done / self._known_steps())

    def state_dict(self) -> dict[str, Any]:
        """Plain values, to be saved beside the optimizer's."""
        return {"done": self.done, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, and set the subnet's lambda to what it was.

        Raises ConfigError for the state of other settings, or of none of ours; nothing is changed then.
        """
        settings = {name: state.get(name) for name in self._settings()} if isinstance(state, dict) else None
        if settings != self._settings():
            raise ConfigError(
                f"the state is of a schedule with {settings}, this one has {self._settings()}: make it with the same"
            )
        done, steps = state.get("done"), self._known_steps()
        if isinstance(done, bool) or not isinstance(done, int) or not 0 <= done <= steps:
            raise ConfigError(f"the state has done={done!r}, expected a whole number from 0 to {steps}")
        self.done = done
        self._set(done / steps)

    def for_trainer(self) -> Any:
        """A `transformers.TrainerCallback`: `Trainer(subnet.model, ..., callbacks=[schedule.for_trainer()])`.

        Evaluations see the lambda of the step that comes next. What was evaluated while lambda was above 0 cannot be
        merged, so it is never the best model: `load_best_model_at_end` chooses among those after it.

        Raises ConfigError where `steps` was given, which the Trainer knows, or transformers is not installed.
        """
        self._refuse_steps("the Trainer")
        transformers = _first_there("Hugging Face's Trainer", "transformers")
        schedule = self
        base: Any = transformers.TrainerCallback
        if isinstance(self.subnet.model, transformers.PreTrainedModel):
            # The Trainer saves weights by the names of old files, and loads them without naming them back: a model
            # that was renamed, as ViT was, goes on with the weights that it has, and a warning. This keeps the names.
            self.subnet.model._weight_conversions = []

        class SetLambda(base):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                schedule._follow(state.global_step, state.max_steps)

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if schedule.lam > 0.0:
                    state.best_metric = state.best_model_checkpoint = state.best_global_step = None
                schedule._follow(state.global_step, state.max_steps)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                schedule._follow(state.global_step, state.max_steps)

        return SetLambda()

    def for_lightning(self) -> Any:
        """A `Callback` of lightning.pytorch, or of pytorch_lightning where that is what there is:
        `Trainer(..., callbacks=[schedule.for_lightning()])`, for a LightningModule that holds the subnet.

        Validation sees the lambda of the step that comes next. A checkpoint that was chosen by its score while lambda
        was above 0 cannot be merged: take the last one, or watch the score after the ramp only.

        Raises ConfigError where `steps` was given, which Lightning knows, or Lightning is not installed; and when
        training starts, where its Trainer has no end.
        """
        self._refuse_steps("Lightning's Trainer")
        names = ["lightning.pytorch", "pytorch_lightning"]
        names.sort(key=lambda name: name not in sys.modules)  # the one that the user has imported
        schedule = self
        base: Any = _first_there("Lightning", *names).Callback

        class SetLambda(base):
            steps: float = 0.0

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                self.steps = trainer.estimated_stepping_batches
                schedule._follow(trainer.global_step, self.steps)

            def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
                schedule._follow(trainer.global_step, self.steps)

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
                schedule._follow(trainer.global_step, self.steps)

        return SetLambda()

    def _set(self, progress: float) -> None:
        self._lam = lambda_at(progress, self.shape, self.share)
        self.subnet.set_lambda(self._lam)

    def _follow(self, done: int, steps: float) -> None:
        if not 1 <= steps < math.inf:
            raise ConfigError(
                f"the trainer takes {steps} steps in all, and lambda needs an end: give it max_steps or max_epochs"
            )
        self._set(min(done / steps, 1.0))

    def _settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "shape": self.shape, "share": self.share}

    def _known_steps(self) -> int:
        if self.steps is None:
            raise ConfigError(
                "how many steps are there in all? Say depthfuse.Schedule(subnet, steps=...); only the callbacks of "
                "for_trainer() and for_lightning() know by themselves"
            )
        return self.steps

    def _refuse_steps(self, who: str) -> None:
        if self.steps is not None:
            raise ConfigError(f"leave steps={self.steps} out: {who} says how many there are")


def _first_there(what: str, *names: str) -> Any:
    """The first of some packages that is installed. Raises ConfigError where none is."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    package = names[0].partition(".")[0]
    raise ConfigError(f"{what} is not installed: pip install {package}")
