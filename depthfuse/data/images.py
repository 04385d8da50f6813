"""Images that must be decoded: any timm or torchvision data set with random access, through a DataLoader."""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from depthfuse.data import decoding, order, scanning
from depthfuse.errors import DataError

Transform = Callable[[Image.Image], Tensor]

# What Pillow raises for files that are truncated, damaged, no images at all, or absurdly large.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def class_names(items: Any) -> list[str]:
    """Names of the classes of a reader or data set, in the order of their numbers; empty where it does not tell."""
    numbers = getattr(items, "class_to_idx", None) or {}
    first = {
        number: name for name, number in reversed(numbers.items())
    }  # torchvision's ImageNet gives synonyms
    return [str(first[number]) for number in sorted(first)]


class DecodedImages(Dataset):
    """Position -> (image, class) of `FolderImages`, a timm `ImageDataset` or a torchvision data set.

    timm's own `__getitem__` replaces an unreadable image by the next one and logs it; here it is an error.

    Args:
        dataset: without a transform. Where torchvision would convert images in a loader, that is replaced.
        mode: "RGB" or "L".
    """

    def __init__(self, dataset: Any, mode: str):
        self.mode = mode
        self.reader = getattr(dataset, "reader", None)
        self.items = dataset if self.reader is None else self.reader
        if hasattr(dataset, "loader"):
            dataset.loader = decoding.open_image

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            source, label = self.items[index][:2]
            with source if isinstance(source, Image.Image) else decoding.open_image(source) as image:
                return decoding.to_mode(image, self.mode), int(label)
        except DECODE_ERRORS as error:
            raise DataError(f"cannot read image {self._name(index)}: {error}. Repair or remove it") from error

    def _name(self, index: int) -> str:
        if hasattr(self.items, "samples"):
            name = self.items.samples[index][0]
        else:
            name = self.reader.filename(index, absolute=True) if self.reader is not None else None
        return scanning.shown(str(name or f"number {index}"))

    def labels(self) -> Tensor | None:
        """[N] int64 without decoding, or None where the data set does not tell.

        Raises:
            DataError: a label is not one whole number.
            ValueError: labels are of several shapes.
        """
        if hasattr(self.items, "samples"):
            labels = [label for _, label, *_ in self.items.samples]
        elif hasattr(self.items, "targets"):
            labels = self.items.targets
        elif hasattr(self.items, "label_key"):
            labels = self.items.dataset[self.items.label_key]
        else:
            return None
        numbers = np.asarray(labels)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iub":
            raise DataError(f"each must be one class number, but there are some like {labels[0]!r}")
        return torch.as_tensor(numbers, dtype=torch.int64)

    def class_names(self) -> list[str]:
        """In the order of class numbers; empty where the data set does not tell."""
        return class_names(self.items)


class ArrayImages(Dataset):
    """The same for single-channel images in memory, for transforms that work on Pillow images.

    Args:
        images: [N, 1, S, S] uint8.
        labels: [N] int64.
        mode: "RGB" or "L".
    """

    def __init__(self, images: Tensor, labels: Tensor, mode: str):
        self.images = images
        self._labels = labels
        self.mode = mode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index, 0].numpy()).convert(self.mode)
        return image, int(self._labels[index])

    def labels(self) -> Tensor:
        return self._labels


class ImageSource:
    """Batches of decoded and transformed images.

    Args:
        images: the data set, of (Pillow image, class).
        train_transform, eval_transform: Pillow image -> [C, S, S] float32.
        workers: processes that decode; 0 decodes in this one.
    """

    def __init__(
        self,
        images: DecodedImages | ArrayImages,
        train_transform: Transform,
        eval_transform: Transform,
        workers: int,
    ):
        self.images = images
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.workers = workers

    def eval_batches(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """One ([B, C, S, S] float32, [B] int64) for each list of positions."""
        return self._load(_Transformed(self.images, self.eval_transform, key=None), batches)

    def train_batches(
        self, batches: Iterable[Tensor], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `eval_batches`, augmented: what becomes of an image depends on (seed, epoch, position) alone."""
        return self._load(_Transformed(self.images, self.train_transform, key=(seed, epoch)), batches)

    def _load(self, dataset: Dataset, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            dataset,
            batch_sampler=[positions.tolist() for positions in batches],
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else it would draw from the caller's global stream
        )
        return iter(loader)


class _Transformed(Dataset):
    """Applies a transform, under random streams fixed by (seed, epoch, index) if `key` is (seed, epoch)."""

    def __init__(self, images: Dataset, transform: Transform, key: tuple[int, int] | None):
        self.images = images
        self.transform = transform
        self.key = key

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        if self.key is None:
            return self.transform(image), label
        with order.seeded_image(*self.key, index):
            return self.transform(image), label
