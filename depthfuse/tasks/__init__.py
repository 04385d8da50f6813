"""What a model is trained for and scored by: classification, segmentation, detection, embedding, or a user's own."""

from __future__ import annotations

from depthfuse import origins
from depthfuse.errors import SpecError, TaskError
from depthfuse.tasks.classification import Agreement, Classification
from depthfuse.tasks.detection import Detection, detections
from depthfuse.tasks.embedding import Embedding
from depthfuse.tasks.functions import TaskOfFunctions
from depthfuse.tasks.segmentation import Segmentation
from depthfuse.tasks.task import Score, Task

CLASSIFICATION = Classification()
AGREEMENT = Agreement()  # no task of its own to ask for: what classification becomes without classes
TASKS: dict[str, Task] = {
    task.name: task for task in (CLASSIFICATION, Segmentation(), Detection(), Embedding())
}


def find_task(name: str) -> Task:
    """The task of a name: one of `TASKS`, or package.module:NAME, a `Task` of the user's own or what gives one.

    Raises TaskError for an unknown name and for what is no task, SpecError for a module that may not be imported
    (`depthfuse.allow_origin`) or cannot be.
    """
    if name in TASKS:
        return TASKS[name]
    if not origins.is_own(name) or name.startswith("hf:"):
        raise TaskError(
            f"unknown task {name!r:.100}; known: {', '.join(TASKS)}, or package.module:NAME of your own"
        )
    found = origins.imported(name)
    if not isinstance(found, Task) and callable(found):
        try:
            found = found()
        except Exception as error:  # the user's own code
            raise SpecError(f"{name} cannot be called: {type(error).__name__} {error}") from error
    if not isinstance(found, Task):
        raise TaskError(
            f"{name} is a {type(found).__name__}, expected a depthfuse.tasks.Task or a function that gives one"
        )
    return found


__all__ = [
    "AGREEMENT",
    "CLASSIFICATION",
    "TASKS",
    "Classification",
    "Detection",
    "Embedding",
    "Score",
    "Segmentation",
    "Task",
    "TaskOfFunctions",
    "detections",
    "find_task",
]
