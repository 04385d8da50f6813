"""Images that are in memory: augmentation and normalisation of whole batches; each is decoded once, if ever."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.data import order, targets
from depthfuse.data.images import DecodedImages, Transform

# Images that lack so few pixels of the wanted side get a border of zeros; others are resized.
_MOST_BORDER = 4


class DecodedOnce:
    """Pixels of images of one size, [N, C, S, S] uint8; each is decoded when it is first asked for, and then kept.

    Args:
        images: position -> (Pillow image, class).
        to_pixels: Pillow image -> [C, S, S] uint8.
        shape: (C, S, S).
    """

    def __init__(self, images: DecodedImages, to_pixels: Transform, shape: tuple[int, int, int]):
        self._images = images
        self._to_pixels = to_pixels
        self._pixels = torch.empty(len(images), *shape, dtype=torch.uint8)  # pages are taken when written to
        self._known = torch.zeros(len(images), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, positions: Tensor) -> Tensor:
        for position in positions[~self._known[positions]].tolist():
            self._pixels[position] = self._to_pixels(self._images[position][0])
        self._known[positions] = True
        return self._pixels[positions]


class PixelSource:
    """uint8 images of one size, held in memory.

    Args:
        images: [N, C, S, S] uint8.
        labels: [N] int64, or masks or boxes (`depthfuse.data.targets`) for images that have the side img_size.
        img_size: side of the batches it gives; up to 4 pixels more are zero-padded, other sizes are resized.
        in_chans: channels of the batches it gives; one channel is repeated where they are more.
        mean, std: of each channel, or of all, on a scale where white is 1.
        augment: flip and shift the training images, and masks and boxes with them.
        padding: of the shift, pixels on each side.
    """

    def __init__(
        self,
        images: Tensor | DecodedOnce,
        labels: Tensor,
        *,
        img_size: int,
        in_chans: int,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        augment: bool,
        padding: int = 2,
    ):
        self.images = images
        self.labels = labels
        self.img_size = img_size
        self.in_chans = in_chans
        self.mean, self.std = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
        self.augment = augment
        self.padding = padding

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
        span = 2 * self.padding + 1
        shift = torch.randint(span, (len(self.images), 2), generator=draws)
        flip = torch.randint(2, (len(self.images),), generator=draws).bool()
        for positions in batches:
            moves = shift[positions], flip[positions], self.padding
            cropped = targets.crop(self.images[positions], *moves)
            yield self._finish(cropped), targets.moved(self.labels[positions], *moves, cropped.shape[-1])

    def _finish(self, images: Tensor) -> Tensor:
        """[B, C, S, S] uint8 -> normalised [B, in_chans, img_size, img_size] float32."""
        pixels = images.float() / 255
        missing = self.img_size - pixels.shape[-1]
        if 0 < missing <= _MOST_BORDER:
            before = missing // 2
            pixels = F.pad(pixels, (before, missing - before, before, missing - before))
        elif missing:
            size = (self.img_size, self.img_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        if pixels.shape[1] != self.in_chans:
            pixels = pixels.expand(-1, self.in_chans, -1, -1)
        return (pixels - self.mean) / self.std
