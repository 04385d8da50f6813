"""Losses and scores of tasks, against values worked out by hand; and what does not fit is named."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from task_nets import build_detector, build_segmenter
from torch import nn

from depthfuse import DataConfig, Supernet, open_data, origins
from depthfuse.config import TrainConfig
from depthfuse.data import DataError, bundle_of_tensors, targets
from depthfuse.data.shapes import draw
from depthfuse.errors import SpecError, TaskError, TrainingDiverged
from depthfuse.tasks import TASKS, Task, TaskOfFunctions, detections, find_task
from depthfuse.tasks.detection import average_precision
from depthfuse.training.evaluation import check_task, evaluate
from depthfuse.training.loop import fit, make_accelerator
from depthfuse.training.objectives import Objective, SandwichObjective

SEGMENTATION, DETECTION, EMBEDDING = (TASKS[name] for name in ("segmentation", "detection", "embedding"))


def score(task, *batches):
    """As `evaluate` puts batches together."""
    counts = [task.measure(output, wanted).double() for output, wanted in batches]
    return task.score(sum(counts) if task.divisible else torch.cat(counts))


def shapes(task, **changes):
    settings = {"img_size": 32, "max_train_images": 256, "batch_size": 32, "holdout": 0.125} | changes
    return open_data(DataConfig(data="shapes", **settings), num_classes=None, targets=task.targets)


# segmentation


def masks_as_logits(masks, classes):
    return 9.0 * F.one_hot(masks.long(), classes).movedim(-1, 1).float()


def test_mean_iou_by_hand():
    wanted = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 255]]], dtype=torch.uint8)
    seen = torch.tensor([[[0, 1, 1, 1], [0, 0, 0, 3]]])
    # class 0: 3 shared of 5; class 1: 2 shared of 4; 2 and 3 occur nowhere that counts
    both = 100 * (3 / 5 + 2 / 4) / 2
    assert score(SEGMENTATION, (masks_as_logits(seen, 4), wanted)).top1 == pytest.approx(both)
    halves = [(masks_as_logits(seen[..., i : i + 2], 4), wanted[..., i : i + 2]) for i in (0, 2)]
    assert score(SEGMENTATION, *halves).top1 == pytest.approx(both)
    right = masks_as_logits(wanted.clamp(max=3), 4)
    assert score(SEGMENTATION, (right, wanted)).top1 == 100.0
    assert score(SEGMENTATION, (right, torch.full_like(wanted, 255))) == (0.0, 0.0)


def test_segmentation_loss_counts_pixels_and_leaves_out_the_ignored():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    wanted = torch.randint(3, (2, 4, 4))
    wanted[0, 0] = 255
    each = F.cross_entropy(logits, wanted.where(wanted != 255, 0), reduction="none")
    loss = SEGMENTATION.loss(logits, wanted)
    torch.testing.assert_close(loss, each[wanted != 255].mean())
    assert score(SEGMENTATION, (logits.detach(), wanted)).loss == pytest.approx(loss.item())
    nothing = SEGMENTATION.loss(logits, torch.full_like(wanted, 255))
    nothing.backward()
    assert nothing.item() == 0.0 and not logits.grad.any()


def test_smaller_logits_are_resized():
    logits = torch.randn(1, 3, 2, 2)
    large = F.interpolate(logits, (8, 8), mode="bilinear", align_corners=False)
    wanted = torch.randint(3, (1, 8, 8))
    torch.testing.assert_close(SEGMENTATION.loss(logits, wanted), SEGMENTATION.loss(large, wanted))


def test_soft_labels_of_pixels_are_those_of_as_many_images():
    output, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = [tensor.movedim(1, -1).reshape(-1, 3) for tensor in (output, teacher)]
    wanted = TASKS["classification"].taught(*flat, 2.0)
    torch.testing.assert_close(SEGMENTATION.taught(output, teacher, 2.0), wanted)
    assert float(SEGMENTATION.taught(output, output)) == pytest.approx(0.0, abs=1e-6)


# detection


def boxes_as_output(*seen, classes=2, side=4):
    """What a detector gives that sees (class, x1, y1, x2, y2, score) in the cell of each box's centre."""
    output = torch.full((1, 4 + classes, side, side), -20.0)
    for kind, *corners, confidence in seen:
        x1, y1, x2, y2 = (side * corner for corner in corners)
        column, row = int((x1 + x2) / 2), int((y1 + y2) / 2)
        distances = column + 0.5 - x1, row + 0.5 - y1, x2 - column - 0.5, y2 - row - 0.5
        output[0, :4, row, column] = torch.tensor([math.log(math.expm1(d)) for d in distances])
        output[0, 4 + kind, row, column] = math.log(confidence / (1 - confidence))
    return output


def objects(*boxes, most=4):
    rows = [list(box) for box in boxes] + [[-1.0, 0.0, 0.0, 0.0, 0.0]] * (most - len(boxes))
    return torch.tensor([rows])


LEFT, RIGHT, LOW = (0.0, 0.1, 0.4, 0.6), (0.6, 0.1, 0.9, 0.45), (0.1, 0.7, 0.5, 0.95)


@pytest.mark.parametrize(
    ("seen", "there", "ap"),
    [
        ([(0, *LEFT, 0.9)], [(0, *LEFT)], 100.0),
        ([(0, *LEFT, 0.9)], [(1, *LEFT)], 0.0),  # of another class
        ([(0, *LEFT, 0.9)], [(0, *LEFT), (0, *RIGHT)], 50.0),
        ([(0, *LEFT, 0.9)], [(0, *LEFT), (1, *RIGHT)], 50.0),  # mean over classes
        ([(0, *LEFT, 0.9), (0, *RIGHT, 0.6)], [(0, *LEFT)], 100.0),  # a miss after all is found costs nothing
        ([(0, *LEFT, 0.6), (0, *RIGHT, 0.9)], [(0, *LEFT)], 50.0),
        ([(0, *LEFT, 0.7), (0, *RIGHT, 0.7)], [(0, *LEFT)], 50.0),  # a tie: both come in together
        # hit, miss, hit: precision 1 up to a recall of 1/2, then 2/3
        ([(0, *LEFT, 0.9), (0, *RIGHT, 0.8), (0, *LOW, 0.7)], [(0, *LEFT), (0, *LOW)], 100 * (1 + 2 / 3) / 2),
        ([(0, *LEFT, 0.04)], [(0, *LEFT)], 0.0),  # below the least score
        ([(0, *LEFT, 0.9)], [], 0.0),
        ([], [(0, *LEFT)], 0.0),
        ([], [], 0.0),
    ],
)
def test_average_precision_by_hand(seen, there, ap):
    assert score(DETECTION, (boxes_as_output(*seen), objects(*there))).top1 == pytest.approx(ap, abs=1e-3)


def test_average_precision_is_of_all_images():
    first = boxes_as_output((0, *LEFT, 0.9)), objects((0, *LEFT))
    second = boxes_as_output((0, *RIGHT, 0.95)), objects((0, *LEFT))
    # a miss, then a hit of two objects: precision 1/2 at a recall of 1/2
    assert score(DETECTION, first, second).top1 == pytest.approx(25.0)
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    assert score(DETECTION, tuple(both)).top1 == pytest.approx(25.0)


def test_a_box_hits_from_half_an_overlap_on_and_an_object_is_hit_once():
    wide = (0.0, 0.1, 0.81, 0.6)  # the object is a bit less than half of it
    assert score(DETECTION, (boxes_as_output((0, *wide, 0.9)), objects((0, *LEFT)))).top1 == 0.0
    wide = (0.0, 0.1, 0.79, 0.6)
    assert score(DETECTION, (boxes_as_output((0, *wide, 0.9)), objects((0, *LEFT)))).top1 > 99.9
    # overlaps the first by less than what is suppressed, and finds the object taken
    twice = [(0, 0.0, 0.1, 0.4, 0.6, 0.9), (0, 0.0, 0.1, 0.7, 0.6, 0.8)]
    hits = DETECTION.measure(boxes_as_output(*twice), objects((0, *LEFT)))[:2000].view(2, 1000).sum(1)
    assert hits.tolist() == [1, 1]


def test_suppression_is_greedy():
    """The second goes by the first; the third overlaps the second alone, and so stays."""
    seen = [(0, 0.0, 0.0, 0.5, 0.5, 0.9), (0, 0.0, 0.1, 0.5, 0.58, 0.8), (0, 0.0, 0.2, 0.5, 0.7, 0.7)]
    found = detections(boxes_as_output(*seen, (1, 0.0, 0.0, 0.55, 0.55, 0.6), side=16))
    kept = found.scores[0] > 0
    assert found.scores[0][kept].tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert found.classes[0][kept].tolist() == [0, 0, 1]  # another class is another thing
    torch.testing.assert_close(found.boxes[0, 1], torch.tensor([0.0, 0.2, 0.5, 0.7]), atol=1e-5, rtol=0)


def test_average_precision_of_random_scores_equals_the_sum_over_ranks():
    hits, misses = torch.randint(3, (50,)).double(), torch.randint(3, (50,)).double()
    count, area, best = float(hits.sum()), 0.0, 0.0
    found, seen = hits.flip(0).cumsum(0).flip(0), (hits + misses).flip(0).cumsum(0).flip(0)
    for index in range(50):  # from the lowest score, whose recall is highest
        best = max(best, float(found[index] / max(seen[index], 1)))
        area += best * float(hits[index]) / count
    assert average_precision(hits, misses, count) == pytest.approx(area)


def test_detection_loss_is_least_where_the_output_is_right():
    there = objects((0, *LEFT), (1, *RIGHT))
    right = boxes_as_output((0, *LEFT, 0.99), (1, *RIGHT, 0.99))
    wrong_class = boxes_as_output((1, *LEFT, 0.99), (1, *RIGHT, 0.99))
    shifted = boxes_as_output((0, *LOW, 0.99), (1, *RIGHT, 0.99))
    losses = [float(DETECTION.loss(output, there)) for output in (right, wrong_class, shifted)]
    assert losses[0] < min(losses[1:])
    nothing = torch.zeros(1, 6, 4, 4, requires_grad=True)
    DETECTION.loss(nothing, objects()).backward()  # images without objects teach as well
    assert nothing.grad.isfinite().all() and nothing.grad[:, 4:].any() and not nothing.grad[:, :4].any()


def test_a_detector_is_taught_towards_its_teacher():
    teacher = boxes_as_output((0, *LEFT, 0.9), (1, *RIGHT, 0.8))
    output = torch.zeros_like(teacher, requires_grad=True)
    optimizer = torch.optim.Adam([output], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        DETECTION.taught(output, teacher).backward()
        optimizer.step()
    wanted, found = detections(teacher), detections(output.detach())
    assert found.classes[0, :2].tolist() == wanted.classes[0, :2].tolist()
    torch.testing.assert_close(found.boxes[0, :2], wanted.boxes[0, :2], atol=0.05, rtol=0)


# embedding, and a task of two functions


def test_recall_is_of_the_nearest_other_image():
    points = torch.tensor([[1.0, 0.0], [3.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.7, 0.7]])
    classes = torch.tensor([0, 0, 1, 1, 0])
    # the last lies nearest to (0.1, 1)
    assert score(EMBEDDING, (points, classes)).top1 == pytest.approx(80.0)
    halves = (points[:2], classes[:2]), (points[2:], classes[2:])
    assert score(EMBEDDING, *halves).top1 == pytest.approx(80.0)  # images of other batches count


def test_embedding_loss_by_hand():
    points = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    classes = torch.tensor([0, 0, 1])  # the third is alone
    wanted = math.log(1 + math.exp(-10.0))  # cosines 1 and 0, over a temperature of 0.1
    loss = EMBEDDING.loss(points, classes)
    assert loss.item() == pytest.approx(wanted, rel=1e-3)
    loss.backward()
    assert points.grad.isfinite().all()
    assert EMBEDDING.loss(points, torch.arange(3)).item() == 0.0
    assert EMBEDDING.taught(points, 5 * points.detach()).item() == pytest.approx(0.0, abs=1e-6)


def quality(output, wanted):
    return (output.argmax(-1) == wanted).float()


def test_a_task_of_two_functions():
    task = TaskOfFunctions(F.cross_entropy, quality, name="own", metric="share right")
    logits, wanted = torch.randn(6, 3), torch.randint(3, (6,))
    got, as_classes = (score(t, (logits, wanted)) for t in (task, TASKS["classification"]))
    assert got.top1 == pytest.approx(as_classes.top1) and got.loss == pytest.approx(as_classes.loss)
    assert task.key == "share_right" and [TASKS[n].key for n in TASKS] == [
        "top1",
        "mean_iou",
        "ap50",
        "recall1",
    ]
    one = TaskOfFunctions(F.cross_entropy, lambda o, t: quality(o, t).mean(), name="own", metric="m")
    with pytest.raises(TaskError, match=r"quality of own is \[\] float32, expected a number an image, \[6\]"):
        one.check(logits, wanted, 3)
    with pytest.raises(TaskError, match="'lr' is taken"):
        TaskOfFunctions(F.cross_entropy, quality, name="own", metric="lr")


# what is not found, or does not fit


def test_tasks_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "from depthfuse.tasks import Segmentation\n\nclass Mine(Segmentation):\n    name = 'mine'\n\nnone = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origins, "_allowed", set())
    assert find_task("detection") is DETECTION
    with pytest.raises(TaskError, match="unknown task 'segmentaton'; known: classification, segmentation"):
        find_task("segmentaton")
    with pytest.raises(SpecError, match="allow_origin"):
        find_task("my_tasks:Mine")
    for name in ("my_tasks:Mine", "my_tasks:none"):
        origins.allow_origin(name)
    assert isinstance(find_task("my_tasks:Mine"), Task)
    with pytest.raises(TaskError, match="my_tasks:none is a int, expected a depthfuse.tasks.Task"):
        find_task("my_tasks:none")


def test_outputs_are_read_from_where_models_keep_them():
    tensor = torch.zeros(2, 3)
    for output in (tensor, {"out": tensor, "aux": None}, {"logits": tensor}, SimpleNamespace(logits=tensor)):
        assert SEGMENTATION.read(output) is tensor
    with pytest.raises(TaskError, match="this one returns a dict of boxes, scores"):
        DETECTION.read({"boxes": tensor, "scores": tensor})


@pytest.mark.parametrize(
    ("task", "output", "wanted", "message"),
    [
        ("classification", (2, 3, 8, 8), torch.zeros(2).long(), r"\[2, 3\]; the model gives \[2, 3, 8, 8\]"),
        ("classification", (2, 3), torch.zeros(2, 8, 8).byte(), r"the data gives \[2, 8, 8\] uint8"),
        (
            "segmentation",
            (2, 3),
            torch.zeros(2, 8, 8).byte(),
            r"\[2, 3, h, w\]; the model gives \[2, 3\] float32",
        ),
        ("segmentation", (2, 4, 8, 8), torch.zeros(2, 8, 8).byte(), r"the model gives \[2, 4, 8, 8\]"),
        ("segmentation", (2, 3, 8, 8), torch.zeros(2).long(), r"the data gives \[2\] int64"),
        (
            "segmentation",
            (2, 3, 8, 8),
            torch.full((2, 8, 8), 7).byte(),
            "hold class 7, where 0 to 2 are known",
        ),
        ("detection", (2, 3, 8, 8), torch.zeros(2, 1, 5) - 1, r"= \[2, 7, h, w\] .*gives \[2, 3, 8, 8\]"),
        ("detection", (2, 7, 8, 8), torch.zeros(2).long(), r"takes \[N, M, 5\] float32 .*gives \[2\] int64"),
        ("detection", (2, 7, 8, 8), objects((0, 10, 10, 50, 60)), "shares of the image's sides; .*50.0"),
        ("detection", (1, 7, 8, 8), objects((3, *LEFT)), r"class \(below 3\)"),
        ("embedding", (2, 3, 8, 8), torch.zeros(2).long(), r"\[2, D\]; the model gives \[2, 3, 8, 8\]"),
    ],
)
def test_what_does_not_fit_is_named(task, output, wanted, message):
    with pytest.raises(TaskError, match=message):
        TASKS[task].check(torch.zeros(output), wanted, 3)


def test_a_task_is_checked_on_real_images():
    data = shapes(SEGMENTATION)
    check_task(SEGMENTATION, build_segmenter(3), data)
    with pytest.raises(TaskError, match=r"the model gives \[2, 5, 4, 4\]"):
        check_task(SEGMENTATION, build_segmenter(5), data)
    with pytest.raises(TaskError, match=r"the model does not take images \[2, 3, 32, 32\] of this data"):
        check_task(SEGMENTATION, nn.Conv2d(1, 3, 1), data)
    as_it_is = {"name": "own", "metric": "m", "targets": "masks"}
    for loss, error, message in (
        (
            lambda o, t: F.cross_entropy(o, t.long()[:, ::8, ::8]) * float("nan"),
            TrainingDiverged,
            "own is nan",
        ),
        (lambda o, t: o.abs(), TaskError, r"a tensor \[2, 3, 4, 4\], expected a single number"),
        (lambda o, t: o.detach().mean(), TaskError, "with a gradient"),
        (lambda o, t: 1.0, TaskError, "the loss of own is float"),
    ):
        own = TaskOfFunctions(loss, lambda o, t: o.mean((1, 2, 3)), **as_it_is)
        with pytest.raises(error, match=message):
            check_task(own, build_segmenter(3), data)


def test_data_without_such_targets_is_refused():
    with pytest.raises(DataError, match="fashion-mnist has a class for each image, and masks are needed"):
        open_data(DataConfig(), num_classes=None, targets="masks")
    with pytest.raises(
        DataError, match="the model has 5 classes, but shapes has 3 .background, rectangle, disc"
    ):
        open_data(DataConfig(data="shapes"), num_classes=5, targets="masks")


# data


@pytest.mark.parametrize("kind", ["masks", "boxes", "classes"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_generated_shapes(kind, in_chans):
    config = DataConfig(data="shapes", img_size=32, batch_size=16, holdout=0.25, max_train_images=64)
    data = open_data(config, num_classes=None, in_chans=in_chans, targets=kind)
    assert data.train_batches() == 3 and len(data.class_names) == (3 if kind == "masks" else 2)
    first, again = (list(data.train_loader(seed=1, epoch=2)) for _ in range(2))
    for (images, wanted), (same, same_wanted) in zip(first, again, strict=True):
        assert images.shape == (16, in_chans, 32, 32) and torch.equal(images, same)
        assert torch.equal(wanted, same_wanted) and targets.form_of(wanted) == kind
    (rest,) = data.train_loader(seed=1, epoch=2, start_batch=2)
    assert torch.equal(rest[0], first[2][0]) and torch.equal(rest[1], first[2][1])


def test_boxes_are_those_of_the_shapes():
    _, masks, boxes = draw("val", 32, 1)
    for mask, (kind, *corners) in zip(masks[:50], boxes[:50, 0], strict=True):
        rows, columns = (mask == 1 + kind).nonzero().unbind(1)
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert torch.stack(around).tolist() == pytest.approx((32 * torch.stack(corners)).tolist(), abs=1e-3)


def test_masks_and_boxes_move_with_their_images():
    """The image is its own mask, so that what moves otherwise than it shows."""
    _, masks, boxes = draw("val", 32, 1)
    shift, flip = torch.randint(9, (len(masks), 2)), torch.rand(len(masks)) < 0.5
    images = targets.crop(masks[:, None], shift, flip, 4)[:, 0]
    moved = targets.moved(masks, shift, flip, 4, 32)
    assert torch.equal(images, moved.masked_fill(moved == 255, 0)) and (moved == 255).any()
    for image, (kind, *corners) in zip(images, targets.moved(boxes, shift, flip, 4, 32)[:, 0], strict=True):
        rows, columns = image.nonzero().unbind(1)
        # of a disc that is cut off, the shown part may be narrower than the box's
        if kind == 0:
            around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert around.tolist() == pytest.approx((32 * torch.stack(corners)).tolist(), abs=1e-3)
    gone = objects((0, 0.0, 0.0, 0.1, 0.1), most=1)
    out = targets.moved(gone, torch.tensor([[8, 8]]), torch.tensor([False]), 4, 32)
    assert out[0, 0, 0] == -1.0
    classes = torch.arange(3)
    assert targets.moved(classes, shift[:3], flip[:3], 4, 32) is classes


@pytest.fixture
def pictures(tmp_path):
    """Two splits of four images and masks of other sizes; the masks with a palette, and in grey."""
    images, masks, _ = draw("val", 32, 1)
    for split, numbers in (("train", range(4)), ("val", range(4, 8))):
        for name in ("images", "masks"):
            (tmp_path / split / name).mkdir(parents=True)
        for number in numbers:
            picture = Image.fromarray(images[number].movedim(0, -1).numpy())
            mask = Image.fromarray(masks[number].numpy())
            if number % 2:
                mask.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
            picture.resize((64, 32)).save(tmp_path / split / "images" / f"{number}.bmp")
            mask.resize((64, 32), Image.Resampling.NEAREST).save(tmp_path / split / "masks" / f"{number}.png")
    return tmp_path


def opened(folder, **changes):
    settings = {"img_size": 32, "batch_size": 2, "holdout": 0.25, "augment": "none"} | changes
    return open_data(DataConfig(data=str(folder), **settings), num_classes=None, targets="masks")


def test_a_folder_of_masks(pictures):
    data = opened(pictures)
    images, masks = next(iter(data.val_loader()))
    assert images.shape == (4, 3, 32, 32) and data.class_names == ["0", "1", "2"]
    assert torch.equal(masks, draw("val", 32, 1)[1][4:8])  # twice as wide and back, never between two classes
    assert data.train_batches() == 1 and len(next(iter(data.holdout_loader()))[1]) == 1


def test_a_folder_of_masks_that_cannot_be_used_is_named(pictures):
    masks = pictures / "train" / "masks"
    with pytest.raises(DataError, match="trained on and measured on"):
        opened(pictures, val_split="train")
    whole = (masks / "0.png").read_bytes()
    for broken, message in (
        (whole[:60], "cannot read .*masks/0.png"),
        ((pictures / "train" / "images" / "0.bmp").read_bytes(), "0.png: it is of Pillow's mode RGB"),
    ):
        (masks / "0.png").write_bytes(broken)
        with pytest.raises(DataError, match=message):
            opened(pictures)
    Image.new("L", (8, 8)).save(masks / "0.png")
    with pytest.raises(DataError, match=r"has \(8, 8\) pixels, its image \(64, 32\)"):
        opened(pictures)
    (masks / "0.png").rename(masks / "9.png")
    with pytest.raises(DataError, match="train has no mask of the name '0'"):
        opened(pictures)
    (pictures / "train" / "images" / "0.bmp").unlink()
    with pytest.raises(DataError, match="train has no image of the name '9'"):
        opened(pictures)
    (masks / "9.png").rename(masks / "1.gif")
    with pytest.raises(DataError, match="1.png and 1.gif are of one name"):
        opened(pictures)
    for path in (pictures / "val" / "masks").iterdir():
        path.unlink()
    (masks / "1.gif").unlink()
    with pytest.raises(DataError, match="masks is empty"):
        opened(pictures)
    (pictures / "val" / "masks").rmdir()
    with pytest.raises(DataError, match="masks does not exist: a split of masks needs"):
        opened(pictures)


def test_tensors_that_do_not_fit_are_named():
    images, wanted = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.zeros(8).long()
    good = images, wanted
    config = DataConfig(batch_size=2)
    assert bundle_of_tensors(config, ["a", "b"], good, good).img_size == 8
    for train, val, changes, message in (
        ((images.float(), wanted), good, {}, r"train images are \[N, C, S, S\] uint8, not .*float32"),
        (good, (images[..., :4], wanted), {}, "val images are"),
        (good, (images, wanted[:3]), {}, "as many of both"),
        (good, good, {"img_size": 16}, "have 8 pixels a side, and img_size is 16"),
        (good, good, {"holdout_split": "val"}, "no splits"),
        ((images, torch.zeros(8, 2)), good, {}, 'cannot move such targets .* choose "none"'),
    ):
        with pytest.raises(DataError, match=message):
            bundle_of_tensors(DataConfig(batch_size=2, **changes), ["a", "b"], train, val)
    free = DataConfig(batch_size=2, augment="none")  # targets of any form
    assert bundle_of_tensors(free, ["a", "b"], (images, torch.zeros(8, 2)), (images, torch.zeros(8, 2)))


def test_data_of_one_s_own_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "import torch\nfrom depthfuse.data import bundle_of_tensors\n\n"
        "def give(config, in_chans):\n"
        "    pair = torch.zeros(64, in_chans, 8, 8, dtype=torch.uint8), torch.zeros(64, 8, 8, dtype=torch.uint8)\n"
        "    return bundle_of_tensors(config, ['a', 'b'], pair, pair)\n\n"
        "def fail(config, in_chans):\n    return 1 / 0\n\n"
        "def none(config, in_chans):\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(origins, "_allowed", set())
    config = DataConfig(data="my_data:give", batch_size=16)
    with pytest.raises(SpecError, match="allow_origin"):
        open_data(config, num_classes=2, targets="masks")
    origins.allow_named([f"--data.data=my_data:{name}" for name in ("give", "fail", "none")])
    data = open_data(config, num_classes=2, in_chans=1, targets="masks")
    assert data.in_chans == 1 and next(iter(data.val_loader()))[1].shape == (64, 8, 8)
    with pytest.raises(DataError, match="my_data:fail, called with .* failed: ZeroDivisionError"):
        open_data(DataConfig(data="my_data:fail"), num_classes=2)
    with pytest.raises(DataError, match="my_data:none gave a int"):
        open_data(DataConfig(data="my_data:none"), num_classes=2)
    sys.modules.pop("my_data")


# training


@pytest.mark.parametrize(("task", "build"), [(SEGMENTATION, build_segmenter), (DETECTION, build_detector)])
def test_it_learns(task, build):
    data, trained = shapes(task), Objective(build(), task=task)
    before = evaluate(trained.net, data.val_loader(), task=task)
    result = fit(trained, data, TrainConfig(epochs=6, lr=6e-3), make_accelerator(cpu=True))
    after = evaluate(trained.net, data.val_loader(), task=task)
    assert after.loss < 0.7 * before.loss and after.top1 > before.top1
    assert result.top1 in [row[task.key] for row in result.history if task.key in row]


def test_a_supernet_of_dictionaries_is_trained():
    data = shapes(SEGMENTATION)
    sandwich = SandwichObjective(Supernet(build_segmenter()), task=SEGMENTATION)
    result = fit(sandwich, data, TrainConfig(epochs=1), make_accelerator(cpu=True))
    assert {"mean_iou_full", "mean_iou_pruned"} < set(result.history[-1])


def test_a_loss_that_becomes_nan_stops_training():
    calls = []

    def loss(output, wanted):
        calls.append(None)
        return SEGMENTATION.loss(output, wanted) * (float("nan") if len(calls) > 3 else 1.0)

    task = TaskOfFunctions(loss, lambda o, t: o.mean((1, 2, 3)), name="own", metric="m", targets="masks")
    with pytest.raises(TrainingDiverged, match="loss is nan at iteration 3; .*none alone: the loss itself"):
        fit(
            Objective(build_segmenter(), task=task),
            shapes(task),
            TrainConfig(epochs=1),
            make_accelerator(cpu=True),
        )
