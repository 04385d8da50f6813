"""Detection without anchors, in the manner of FCOS (Tian et al., ICCV 2019): each cell of a map tells of one object.

What a model gives, [N, 4 + classes, h, w]: for each cell how far the sides of a box lie from its centre, left, top,
right and bottom, in cells, before a softplus; then a logit for each class. What data gives, [N, M, 5] float32: class,
x1, y1, x2, y2 of up to M objects, positions as shares of width and height of the image; of an object that is not there
the class is -1. So neither the size of images nor the stride of the map has to be told.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.errors import TaskError
from depthfuse.tasks.task import Score, Task, shape_of

_ALPHA, _GAMMA = 0.25, 2.0  # of the focal loss (Lin et al., ICCV 2017)
_RADIUS = 1.5  # cells around a box's centre that learn it (FCOS, centre sampling)
_MOST, _LEAST_SCORE, _MOST_OVERLAP = 100, 0.05, 0.6  # of detections an image, as FCOS
_HIT = 0.5  # intersection over union
_BINS = 1000  # of scores; counts of all images then have a fixed size, and can be added up


class Detections(NamedTuple):
    """What a detector sees in N images, best first."""

    boxes: Tensor  # [N, K, 4] float32: x1, y1, x2, y2 as shares of width and height
    scores: Tensor  # [N, K] float32, in [0, 1]; 0 from the last detection on
    classes: Tensor  # [N, K] int64


class Detection(Task):
    """See above. Loss: focal loss of the classes and generalised IoU loss of the boxes (Rezatofighi et al., CVPR 2019),
    over the cells that learn an object. Score: AP50, the mean over classes of the area under the precision-recall curve
    (all points, as Pascal VOC since 2010), at an intersection over union of 0.5 and scores to a thousandth.
    """

    name = "detection"
    metric = "AP50"
    targets = "boxes"

    def loss(self, output: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """There are no labels to smooth: the focal loss is of independent classes."""
        boxes, logits = _boxes(output), _by_cell(output[:, 4:])
        wanted, classes = _assigned(targets, *output.shape[-2:])
        known = classes >= 0
        one_hot = F.one_hot(classes.clamp(min=0), logits.shape[-1]) * known[..., None]
        count = known.sum().clamp(min=1)
        return (_focal(logits, one_hot.float()) + (1.0 - _giou(boxes[known], wanted[known])).sum()) / count

    def taught(self, output: Tensor, teacher: Tensor, temperature: float | None = None) -> Tensor:
        """Class probabilities by binary cross-entropy, distances by their absolute difference, each cell as much as the
        teacher believes in an object there; a mean over what it believes in, and at least one cell."""
        soft = _by_cell(teacher[:, 4:]).sigmoid()
        belief = soft.amax(-1)
        count = belief.sum().clamp(min=1.0)
        labels = F.binary_cross_entropy_with_logits(_by_cell(output[:, 4:]), soft, reduction="sum")
        distances = [_by_cell(F.softplus(given[:, :4].float())) for given in (output, teacher)]
        apart = (distances[0] - distances[1]).abs().mean(-1)
        return (labels + (belief * apart).sum()) / count

    def measure(self, output: Tensor, targets: Tensor) -> Tensor:
        """[classes * (2 * bins + 1) + 2]: by class hits and misses by score, and objects; summed loss, images."""
        classes = output.shape[1] - 4
        found = detections(output)
        hits = _hits(found, targets)
        there = found.scores > 0
        bins = (found.scores * _BINS).long().clamp(max=_BINS - 1)
        place = (found.classes * 2 + (~hits).long()) * _BINS + bins
        counts = torch.bincount(place[there], minlength=classes * 2 * _BINS)
        objects = targets[..., 0].long()
        objects = torch.bincount(objects[objects >= 0], minlength=classes)
        count = torch.tensor([len(targets)], device=output.device)
        loss = self.loss(output, targets)[None] * count
        return torch.cat([part.double() for part in (counts, objects, loss, count)])

    def score(self, counts: Tensor) -> Score:
        classes = (len(counts) - 2) // (2 * _BINS + 1)
        by_score = counts[: classes * 2 * _BINS].view(classes, 2, _BINS)
        objects = counts[classes * 2 * _BINS : -2]
        loss, images = counts[-2:].tolist()
        each = [
            average_precision(hits, misses, float(count))
            for (hits, misses), count in zip(by_score, objects, strict=True)
            if count > 0
        ]
        return Score(100.0 * sum(each) / len(each) if each else 0.0, loss / images)

    def check(self, output: Tensor, targets: Tensor, num_classes: int) -> None:
        if targets.ndim != 3 or targets.shape[-1] != 5 or not targets.is_floating_point():
            raise TaskError(
                "detection takes [N, M, 5] float32 as targets (class or -1, x1, y1, x2, y2 as shares of the image's "
                f"sides); the data gives {shape_of(targets)}"
            )
        objects = targets[targets[..., 0] >= 0]
        x1, y1, x2, y2 = objects[:, 1:].unbind(1)
        inside = (objects[:, 1:] >= 0).all() and (objects[:, 1:] <= 1).all()
        if not (inside and (x1 < x2).all() and (y1 < y2).all() and (objects[:, 0] < num_classes).all()):
            raise TaskError(
                f"boxes are class (below {num_classes}), x1 < x2 and y1 < y2, as shares of the image's sides; the data "
                f"gives {[round(value, 3) for value in objects[0].tolist()]}, for one"
            )
        if output.ndim != 4 or output.shape[:2] != (len(targets), 4 + num_classes):
            raise TaskError(
                f"detection takes [N, 4 + classes, h, w] = [{len(targets)}, {4 + num_classes}, h, w] (four distances, "
                f"then logits); the model gives {shape_of(output)}"
            )


@torch.no_grad()
def detections(output: Tensor) -> Detections:
    """What a model's output [N, 4 + classes, h, w] says: the best 100 boxes an image, without those that overlap a
    better one of their class by more than 0.6 (greedy non-maximum suppression)."""
    size = torch.tensor([output.shape[-1], output.shape[-2]], device=output.device).repeat(2)
    scores, order = _by_cell(output[:, 4:]).sigmoid().flatten(1).sort(dim=1, descending=True, stable=True)
    scores, order = scores[:, :_MOST], order[:, :_MOST]
    num_classes = output.shape[1] - 4
    cells = (order // num_classes)[..., None].expand(-1, -1, 4)
    boxes = (_boxes(output).gather(1, cells) / size).clamp(0.0, 1.0)
    classes = order % num_classes
    kept = _unsuppressed(boxes, classes) & (scores >= _LEAST_SCORE)
    scores = scores * kept
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return Detections(boxes, scores, classes.gather(1, order))


def average_precision(hits: Tensor, misses: Tensor, objects: float) -> float:
    """Area under the precision-recall curve, from 0 to 1.

    hits, misses: [bins], how many detections of each score, from the lowest; those of one bin come in together.
    """
    hits, misses = hits.flip(0).cumsum(0), misses.flip(0).cumsum(0)
    recall = F.pad(hits / objects, (1, 0))
    precision = hits / (hits + misses).clamp(min=1)
    envelope = precision.flip(0).cummax(0).values.flip(0)  # the best precision at this recall or a higher one
    return float((recall.diff() * envelope).sum())


def _by_cell(maps: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, h * w, C] float32."""
    return maps.float().flatten(2).transpose(1, 2)


def _centres(height: int, width: int, device: torch.device) -> Tensor:
    """[h * w, 2]: x and y of the cells' centres, in cells."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([x, y], dim=-1).view(-1, 2) + 0.5


def _boxes(output: Tensor) -> Tensor:
    """[N, h * w, 4] float32: x1, y1, x2, y2 of each cell's box, in cells."""
    distances = F.softplus(_by_cell(output[:, :4]))
    centres = _centres(output.shape[-2], output.shape[-1], output.device)
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)


def _assigned(targets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(boxes [N, h * w, 4] in cells, classes [N, h * w], -1 for none): what each cell learns.

    A cell learns an object if its centre lies in the box, near the box's centre; of several the smallest. The cell that
    holds the box's centre does in any case.
    """
    size = torch.tensor([width, height], device=targets.device).repeat(2)
    boxes = targets[..., 1:].float() * size  # [N, M, 4]
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    points = _centres(height, width, targets.device)[:, None]  # [P, 1, 2]
    lower, upper = points - boxes[:, None, :, :2], boxes[:, None, :, 2:] - points  # [N, P, M, 2]
    apart = (points - middle[:, None]).abs().amax(-1)  # [N, P, M]
    within = (torch.minimum(lower, upper).amin(-1) > 0) & (apart < _RADIUS)
    home = (points.floor() == middle[:, None].floor()).all(-1)
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))[:, None]
    learns = (within | home) & (targets[..., 0] >= 0)[:, None]
    smallest, index = torch.where(learns, area, float("inf")).min(-1)  # [N, P]
    classes = targets[..., 0].long().gather(1, index)
    wanted = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return wanted, torch.where(smallest.isfinite(), classes, -1)


def _focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss of independent classes, summed."""
    entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    missed = (logits.sigmoid() - labels).abs()
    weight = _ALPHA * labels + (1.0 - _ALPHA) * (1.0 - labels)
    return (weight * missed**_GAMMA * entropy).sum()


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(intersections, unions) of boxes, broadcast."""
    both = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], dim=-1)
    shared = _area(both)
    return shared, _area(a) + _area(b) - shared


def _giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of pairs of boxes [K, 4], in [-1, 1]."""
    shared, union = _overlap(a, b)
    hull = _area(torch.cat([torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:])], dim=-1))
    small = torch.finfo(a.dtype).tiny
    return shared / union.clamp(min=small) - (hull - union) / hull.clamp(min=small)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """[N, A, 4] and [N, B, 4] -> [N, A, B]."""
    shared, union = _overlap(a[:, :, None], b[:, None])
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def _unsuppressed(boxes: Tensor, classes: Tensor) -> Tensor:
    """[N, K] bool: what greedy suppression leaves of boxes [N, K, 4], best first.

    A box goes where a better one that stays overlaps it. Each round settles at least one more box, in order, so that
    rounds end with the greedy answer; some few are enough.
    """
    overlaps = (_iou(boxes, boxes) > _MOST_OVERLAP) & (classes[:, :, None] == classes[:, None])
    better = overlaps.tril(-1)  # [n, i, j]: j is better than i
    kept = torch.ones_like(classes, dtype=torch.bool)
    while True:
        now = ~(better & kept[:, None]).any(-1)
        if torch.equal(now, kept):
            return kept
        kept = now


def _hits(found: Detections, targets: Tensor) -> Tensor:
    """[N, K] bool: which detections, best first, hit an object of their class that none before has hit."""
    objects = targets[..., 0].long()
    overlap = _iou(found.boxes, targets[..., 1:].float())  # [N, K, M]
    overlap = torch.where(found.classes[..., None] == objects[:, None], overlap, -1.0)
    overlap = torch.where(found.scores[..., None] > 0, overlap, -1.0)
    hits = torch.zeros_like(found.classes, dtype=torch.bool)
    free = torch.ones_like(objects, dtype=torch.bool)
    if not objects.shape[1]:
        return hits
    for rank in range(found.classes.shape[1]):
        best, index = torch.where(free, overlap[:, rank], -1.0).max(-1)
        hits[:, rank] = best >= _HIT
        free &= ~(F.one_hot(index, free.shape[1]).bool() & hits[:, rank, None])
    return hits
