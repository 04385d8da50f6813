"""Images without classes: the original net answers for them, once, and every later stage learns and scores by that."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from depthfuse.config import PruneConfig
from depthfuse.data import DataBundle
from depthfuse.data.bundle import IndexedBundle
from depthfuse.errors import ConfigError
from depthfuse.log import progress
from depthfuse.merging.model_inputs import input_size
from depthfuse.runs.weights import CLASSES, unfit_given
from depthfuse.spec import ModelSource
from depthfuse.tasks import CLASSIFICATION, Classification, Task
from depthfuse.training.evaluation import in_eval_mode
from depthfuse.untrusted import is_out_of_memory

log = logging.getLogger(__name__)


def answering_classes(config: PruneConfig, task: Task, probe: nn.Module) -> int:
    """The number of classes of the net that shall answer for the images of `config.data`.

    Args:
        probe: the model, built with its own arguments.

    Raises:
        ConfigError: a task that needs true targets, or a net that is not finished. CheckpointError: weights of another
            model.
    """
    name = config.data.data
    if type(task) is not Classification:
        raise ConfigError(
            f"the images in {name} have no classes: the original net's own answers can stand for them in "
            f"{CLASSIFICATION.name}, and not in {task.name}, which needs targets"
        )
    if config.weights is None and not config.pretrained:
        raise ConfigError(
            f"the images in {name} have no classes: the original net's own answers can be their targets, if it is "
            "finished. Give its weights (--weights FILE, or --pretrained), or sort the images into one sub-folder for "
            "each class to train it here"
        )
    source = ModelSource.of(probe)
    classes = source.kwargs.get(CLASSES) or _outputs(probe)
    source = ModelSource.make(source.name, **{**source.kwargs, CLASSES: classes})
    unfit = unfit_given(source, config.weights, config.pretrained)
    if unfit:
        raise ConfigError(
            f"the images in {name} have no classes, and those of the weights are not the model's "
            f"({', '.join(unfit.values())}): a new classifier cannot be trained without. Give the model as many as the "
            f"weights have (--model-kwargs {CLASSES}=N), or sort the images into one sub-folder for each class"
        )
    return classes


def _outputs(probe: nn.Module) -> int:
    """How many classes a model has that says so, or else gives so many numbers for an image."""
    said = getattr(probe, CLASSES, None)
    if isinstance(said, int):
        return said
    try:
        with torch.no_grad(), in_eval_mode(probe):
            return CLASSIFICATION.read(probe(torch.zeros(1, *input_size(probe)))).shape[-1]
    except Exception as error:  # the model's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"how many classes the model has could not be found out ({type(error).__name__}: {error}): say so, "
            f"--model-kwargs {CLASSES}=N"
        ) from error


@torch.no_grad()
def ask(net: nn.Module, data: DataBundle) -> dict[str, Tensor]:
    """The class that a net gives each image: {part: [N] int64}, as `IndexedBundle.answered` takes it."""
    assert isinstance(data, IndexedBundle)
    device, questions = next(net.parameters()).device, data.questions()
    answers: dict[str, Tensor] = {}
    total = sum(map(len, questions.values()))
    with in_eval_mode(net), progress("answers", total=total) as bar:
        for part, batches in questions.items():
            found = [torch.zeros(0, dtype=torch.int64)]
            for images, _ in batches:
                found.append(CLASSIFICATION.read(net(images.to(device))).argmax(-1).cpu())
                bar.advance()
            answers[part] = torch.cat(found)
    kinds = len(torch.cat(list(answers.values())).unique())
    log.info(
        "the baseline has answered for %d images: %d of its classes occur",
        sum(map(len, answers.values())),
        kinds,
    )
    if kinds < 2:
        log.warning("the baseline gives all images the same class: agreement with it will tell nothing")
    return answers


def give(data: DataBundle, answers: dict[str, Tensor], where: Path) -> DataBundle:
    """The data with its answers. Raises DataError where they are for other images."""
    assert isinstance(data, IndexedBundle)
    return data.answered(answers, str(where))
