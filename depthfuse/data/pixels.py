"""Images that are already in memory: augmentation and normalisation of whole batches, with no decoding."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.data import order

# Source images are padded by this many pixels on each side before a crop of the old size is taken.
CROP_PADDING = 2


class PixelSource:
    """Single-channel uint8 images of one size, held in memory.

    Args:
        images: [N, 1, S, S] uint8.
        labels: [N] int64.
        img_size: side of the batches it gives; up to 4 pixels more are zero-padded, other sizes are resized.
        in_chans: channels of the batches it gives; the one channel is repeated.
        mean, std: of one channel, on a scale where white is 1.
        augment: flip and shift the training images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        img_size: int,
        in_chans: int,
        mean: float,
        std: float,
        augment: bool,
    ):
        self.images = images
        self.labels = labels
        self.img_size = img_size
        self.in_chans = in_chans
        self.mean = mean
        self.std = std
        self.augment = augment

    def eval_batches(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """One ([B, C, S, S] float32, [B] int64) for each list of positions."""
        for positions in batches:
            yield self._finish(self.images[positions]), self.labels[positions]

    def train_batches(
        self, batches: Iterable[Tensor], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `eval_batches`, augmented: what becomes of an image depends on (seed, epoch, position) alone."""
        if not self.augment:
            yield from self.eval_batches(batches)
            return
        draws = order.augment_generator(seed, epoch)
        span = 2 * CROP_PADDING + 1
        shift = torch.randint(span, (len(self.images), 2), generator=draws)
        flip = torch.randint(2, (len(self.images),), generator=draws).bool()
        for positions in batches:
            cropped = _crop(self.images[positions], shift[positions], flip[positions])
            yield self._finish(cropped), self.labels[positions]

    def _finish(self, images: Tensor) -> Tensor:
        """[B, 1, S, S] uint8 -> normalised [B, in_chans, img_size, img_size] float32."""
        pixels = images.float() / 255
        missing = self.img_size - pixels.shape[-1]
        if 0 < missing <= 2 * CROP_PADDING:
            before = missing // 2
            pixels = F.pad(pixels, (before, missing - before, before, missing - before))
        elif missing:
            size = (self.img_size, self.img_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        return ((pixels - self.mean) / self.std).repeat(1, self.in_chans, 1, 1)


def _crop(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Pad with zeros, crop at `shift` and mirror where `flip` says.

    Args:
        images: [B, 1, S, S] uint8.
        shift: [B, 2] int64, first row and column of the crop in the padded image.
        flip: [B] bool.
    """
    size = images.shape[-1]
    padded = F.pad(images[:, 0], (CROP_PADDING,) * 4)  # [B, S + 2P, S + 2P]
    along = torch.arange(size)
    rows = shift[:, :1] + along  # [B, S]
    columns = shift[:, 1:] + torch.where(flip[:, None], size - 1 - along, along)  # [B, S]
    batch = torch.arange(len(images))[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
