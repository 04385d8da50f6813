"""What is to be learned of images, and how it moves with them.

classes   [B] int64
masks     [B, S, S] uint8, the class of each pixel; 255 where it counts nowhere
boxes     [B, M, 5] float32: class, x1, y1, x2, y2 as shares of the image's sides; class -1 for no object
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Targets = Literal["classes", "masks", "boxes"]

# The class of an image that has none: no loss takes it, so that nothing is learned of it by mistake.
UNKNOWN = -1
IGNORED = 255  # of a mask, as in Pascal VOC and Cityscapes


def form_of(targets: Tensor) -> Targets | None:
    """Which of the three a tensor is; None for another."""
    if targets.ndim == 1 and targets.dtype == torch.int64:
        return "classes"
    if targets.ndim == 3 and targets.dtype == torch.uint8:
        return "masks"
    if targets.ndim == 3 and targets.shape[-1] == 5 and targets.is_floating_point():
        return "boxes"
    return None


def moved(targets: Tensor, shift: Tensor, flip: Tensor, padding: int, size: int) -> Tensor:
    """Targets of images of `size` pixels a side that went through `crop`."""
    form = form_of(targets)
    if form == "masks":
        return crop(targets[:, None], shift, flip, padding, border=IGNORED)[:, 0]
    if form == "boxes":
        return _moved_boxes(targets, (shift - padding) / size, flip)
    return targets


def _moved_boxes(boxes: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """shift: [B, 2], the way up and left in shares of a side. What is pushed out of the image is no object any more."""
    classes, x1, y1, x2, y2 = boxes.unbind(-1)
    down, right = shift.to(boxes.dtype).unsqueeze(-1).unbind(1)
    x1, x2, y1, y2 = x1 - right, x2 - right, y1 - down, y2 - down
    x1, x2 = torch.where(flip[:, None], 1.0 - x2, x1), torch.where(flip[:, None], 1.0 - x1, x2)
    corners = torch.stack([x1, y1, x2, y2], dim=-1).clamp(0.0, 1.0)
    left = (corners[..., 0] < corners[..., 2]) & (corners[..., 1] < corners[..., 3])
    return torch.cat([torch.where(left, classes, -1.0)[..., None], corners], dim=-1)


def crop(images: Tensor, shift: Tensor, flip: Tensor, padding: int, border: int = 0) -> Tensor:
    """Pad with `border`, crop at `shift` and mirror where `flip` says.

    Args:
        images: [B, C, S, S] uint8.
        shift: [B, 2] int64, first row and column of the crop in the padded image.
        flip: [B] bool.
    """
    size = images.shape[-1]
    padded = F.pad(images, (padding,) * 4, value=border).movedim(1, -1)  # [B, S + 2P, S + 2P, C]
    along = torch.arange(size)
    rows = shift[:, :1] + along  # [B, S]
    columns = shift[:, 1:] + torch.where(flip[:, None], size - 1 - along, along)  # [B, S]
    batch = torch.arange(len(images))[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
