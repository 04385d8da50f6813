"""Generated images of coloured rectangles and discs on noise, with masks and boxes: data that needs no files, on which
small segmentation nets and detectors learn something in a minute."""

import functools

import torch
from torch import Tensor

from depthfuse.data import order
from depthfuse.data.bundle import DataBundle
from depthfuse.data.config import DataConfig
from depthfuse.data.targets import Targets
from depthfuse.data.tensors import bundle_of_tensors

NAME = "shapes"
CLASS_NAMES = ("rectangle", "disc")
_SIZE = 64  # pixels a side, where nothing else is asked for
_COUNTS = {"train": 1024, "val": 256}
_MOST = 3  # shapes an image


def open_shapes(config: DataConfig, in_chans: int, targets: Targets) -> DataBundle:
    """The generated images with targets of one kind; with "classes" there is one shape an image. Masks have a third
    class, 0, the background."""
    size, most = config.img_size or _SIZE, 1 if targets == "classes" else _MOST
    train, val = (draw(split, size, most) for split in ("train", "val"))
    names = ("background", *CLASS_NAMES) if targets == "masks" else CLASS_NAMES
    which = {"masks": lambda drawn: drawn[1], "boxes": lambda drawn: drawn[2]}.get(
        targets, lambda drawn: drawn[2][:, 0, 0].long()
    )
    pairs = [
        (drawn[0] if in_chans == 3 else drawn[0].float().mean(1, keepdim=True).byte(), which(drawn))
        for drawn in (train, val)
    ]
    return bundle_of_tensors(config, names, *pairs, in_chans=in_chans)


@functools.cache
def draw(split: str, size: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The images of "train" or "val", always the same.

    Args:
        size: pixels a side.
        most: shapes an image, from 1 on; a later one may lie over part of an earlier one.

    Returns:
        images: [N, 3, size, size] uint8.
        masks: [N, size, size] uint8: 0 background, 1 rectangle, 2 disc.
        boxes: [N, most, 5] float32, see `depthfuse.data.targets`.
    """
    draws = order.generator(order.SHAPES, list(_COUNTS).index(split), size)
    count = _COUNTS[split]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=draws)

    images = 0.35 * uniform(3, size, size)
    masks = torch.zeros(count, size, size, dtype=torch.uint8)
    boxes = torch.full((count, most, 5), -1.0)
    boxes[..., 1:] = 0.0
    present = 1 + (uniform() * most).long()
    rows = torch.arange(size)[:, None] + 0.5
    columns = torch.arange(size) + 0.5
    for index in range(most):
        disc = uniform() < 0.5
        sides = (size * (0.2 + 0.25 * uniform(2))).round()
        sides = torch.where(disc[:, None], sides[:, :1], sides)
        corner = (uniform(2) * (size - sides)).floor()
        x1, y1 = corner[:, 0], corner[:, 1]
        x2, y2 = x1 + sides[:, 0], y1 + sides[:, 1]
        left, top, right, bottom = (edge[:, None, None] for edge in (x1, y1, x2, y2))
        inside = (columns > left) & (columns < right) & (rows > top) & (rows < bottom)
        apart = (columns - (left + right) / 2) ** 2 + (rows - (top + bottom) / 2) ** 2
        inside &= ~disc[:, None, None] | (apart < ((right - left) / 2) ** 2)
        there = index < present
        inside &= there[:, None, None]
        colour = 0.5 + 0.5 * uniform(3)
        images = torch.where(inside[:, None], colour[..., None, None], images)
        masks[inside] = 0
        masks += inside * (1 + disc[:, None, None]).byte()
        box = torch.stack([disc.float(), x1 / size, y1 / size, x2 / size, y2 / size], dim=1)
        boxes[:, index] = torch.where(there[:, None], box, boxes[:, index])
    return (images * 255).byte(), masks, boxes
