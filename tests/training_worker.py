"""One of several processes that train and score together: training_worker.py FOLDER, where it leaves
RANK.json and weights."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from shards import CLASSES, numbers, shard_config
from task_nets import build_detector, build_segmenter
from torch import nn

from depthfuse import DataConfig, ModelSource, open_data
from depthfuse.checkpoint import save_tensors
from depthfuse.config import TrainConfig
from depthfuse.data import DataBundle, DataError
from depthfuse.tasks import TASKS, Score
from depthfuse.training.evaluation import calibrate, evaluate, top1
from depthfuse.training.loop import fit, make_accelerator
from depthfuse.training.objectives import Objective

EMBEDDED = DataConfig(max_train_images=1280, batch_size=32, holdout=0.5)
TRAINING = TrainConfig(epochs=1, lr=2e-3, warmup_epochs=0.0)


def net(**changes) -> nn.Module:
    torch.manual_seed(3)
    arguments = {"channels": (8, 12, 16, 24), "layers": (1, 1, 1, 1), "in_chans": 1, "num_classes": 10}
    return ModelSource.make("resnet18", **(arguments | changes)).build()


class Watched(nn.Module):
    """Remembers which images it has been shown."""

    def __init__(self, inner: nn.Module, data):
        super().__init__()
        self.inner, self.data = inner, data
        self.seen: list[int] = []

    def forward(self, images):
        self.seen += numbers(self.data, images).tolist()
        return self.inner(images)


def watched(data) -> Watched:
    return Watched(net(in_chans=3, num_classes=CLASSES), data)


def scores_of_tasks(accelerator: Accelerator | None) -> dict[str, Score]:
    """One batch of masks, so that a second process has none; three of boxes; embeddings, which all processes see."""
    scores = {}
    for name, build, batch_size in (
        ("segmentation", build_segmenter, 256),
        ("detection", build_detector, 100),
        ("embedding", lambda: net(num_classes=0, in_chans=3), 100),
    ):
        torch.manual_seed(3)
        task, scored = TASKS[name], build()
        settings = DataConfig(data="shapes", img_size=32, val_batch_size=batch_size)
        data = open_data(settings, num_classes=None, targets=task.targets)
        scores[name] = evaluate(scored, data.val_loader(), accelerator, task)
    return scores


def poisoned(rank: int) -> Objective:
    """In its third step a weight is no number any more, on one process."""
    objective, steps = Objective(net()), []
    forward = objective.forward

    def poisoning(*args):
        steps.append(None)
        if rank == 1 and len(steps) == 3:
            with torch.no_grad():
                objective.net.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")
        return forward(*args)

    objective.forward = poisoning
    return objective


def break_third_batch(data: DataBundle) -> None:
    load = data.train_loader

    def breaking(**arguments):
        for number, batch in enumerate(load(**arguments)):
            if number == 2:
                raise DataError("cannot read 2.jpg")
            yield batch

    data.train_loader = breaking


def main(folder: Path) -> None:
    accelerator = make_accelerator(cpu=True)
    rank = accelerator.process_index
    facts = {}
    (folder / f"{rank}.json").touch()
    accelerator.wait_for_everyone()

    stream = open_data(shard_config(folder, val_batch_size=5), num_classes=CLASSES)
    scored = watched(stream)
    facts["score"] = evaluate(scored, stream.val_loader(), accelerator)
    facts["scored"] = scored.seen
    if accelerator.is_main_process:
        alone = watched(stream)
        facts["score alone"], facts["scored alone"] = evaluate(alone, stream.val_loader()), alone.seen
    facts["tasks"] = scores_of_tasks(accelerator)
    calibrated = watched(stream)
    calibrate(calibrated, stream, 20)
    save_tensors(folder / f"calibrated{rank}.safetensors", calibrated.inner.state_dict())

    data = open_data(EMBEDDED, num_classes=None, in_chans=1)
    for name, ema_decay in (("plain", 0.0), ("averaged", 0.8)):
        trained = net()
        settings = TrainConfig(epochs=1, lr=2e-3, warmup_epochs=0.0, ema_decay=ema_decay)
        state = folder / f"{name}.state"
        result = fit(Objective(trained), data, settings, accelerator, checkpoint=state)
        facts[name] = [result.top1, top1(trained, data.holdout_loader())]
        save_tensors(folder / f"{name}{rank}.safetensors", trained.state_dict())

    def error_of(objective: Objective, data: DataBundle, **options) -> str:
        try:
            fit(objective, data, TRAINING, accelerator, **options)
        except Exception as error:  # whatever it is, the test compares it
            return f"{type(error).__name__}: {error}"
        return "none"

    facts["diverged"] = error_of(poisoned(rank), data)
    facts["no room"] = error_of(
        Objective(net()), data, checkpoint=folder / "0.json" / "state", checkpoint_seconds=0.0
    )
    if rank == 1:
        break_third_batch(data)
    facts["broken"] = error_of(Objective(net()), data)
    (folder / f"{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
