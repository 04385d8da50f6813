"""Data that can only be read from front to back: WebDataset, TFDS and streamed Hugging Face data sets."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from depthfuse.data import order
from depthfuse.data.bundle import Batch, Batches, DataBundle, equal_batch_size
from depthfuse.data.config import DataConfig
from depthfuse.data.images import Transform
from depthfuse.data.transforms import InputFormat
from depthfuse.errors import DataError


class StreamBundle(DataBundle):
    """A streamed data set. Its order depends on (seed, epoch) and on the number of workers.

    Resuming reads and throws away what comes before. Nothing can be divided off a stream, so that
    `holdout_split` must name the images that score the search. timm's reader skips unreadable images of a
    shard and logs them.

    Args:
        open_split: (split, is_training, seed) -> a timm `IterableImageDataset` without a transform.
        train_transform, eval_transform: Pillow image -> [C, S, S] float32.
    """

    def __init__(
        self,
        config: DataConfig,
        class_names: list[str],
        format: InputFormat,
        *,
        open_split: Callable[[str, bool, int], Any],
        train_transform: Transform,
        eval_transform: Transform,
    ):
        super().__init__(config, class_names, format)
        if config.max_train_images is not None:
            raise DataError(f"max_train_images cannot be used with {config.data}, which is a stream")
        self._open_split = open_split
        self._train_transform = train_transform
        self._eval_transform = eval_transform
        self._num_train = _num_images(open_split(config.train_split, False, 0), config.train_split)
        self.train_batches()  # raises if there is not one

    def train_batches(self, world_size: int = 1) -> int:
        return self._count_batches(self._num_train, world_size)

    def train_loader(
        self, *, seed: int, epoch: int, start_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batches:
        # timm's readers find out rank and world size by themselves.
        stop = self.train_batches(world_size)

        def batches() -> Iterator[Batch]:
            images = self._open_split(self.config.train_split, True, seed)
            images.set_epoch(epoch)
            stream = _Transformed(images, self._train_transform, self.num_classes, key=(seed, epoch))
            size = self.config.batch_size
            yield from itertools.islice(self._load(stream, size, drop_last=True), start_batch, stop)

        return Batches(batches, max(stop - start_batch, 0))

    def val_loader(self) -> Batches:
        return self._eval_loader(self.config.val_split)

    def holdout_loader(self) -> Batches:
        if self.config.holdout_split is None:
            raise DataError(
                f"{self.config.data} is a stream, from which nothing can be held out: name a holdout_split"
            )
        return self._eval_loader(self.config.holdout_split)

    def calibration_loader(self, num_images: int) -> Batches:
        wanted = min(num_images, self._num_train)
        size = equal_batch_size(wanted, self.config.val_batch_size)
        return self._eval_loader(self.config.train_split, size, wanted // size)

    def _eval_loader(self, split: str, batch_size: int | None = None, stop: int | None = None) -> Batches:
        size = batch_size or self.config.val_batch_size
        if stop is None:
            stop = -(-_num_images(self._open_split(split, False, 0), split) // size)

        def batches() -> Iterator[Batch]:
            images = self._open_split(split, False, 0)
            stream = _Transformed(images, self._eval_transform, self.num_classes, key=None)
            yield from itertools.islice(self._load(stream, size, drop_last=False), stop)

        return Batches(batches, stop)

    def _load(self, stream: IterableDataset, batch_size: int, drop_last: bool) -> Iterator[Batch]:
        return iter(
            DataLoader(
                stream,
                batch_size=batch_size,
                num_workers=self.config.workers,
                drop_last=drop_last,
                pin_memory=torch.cuda.is_available(),
                # Workers derive the seed of their shuffle from it, so it is fixed; the epoch is set above.
                generator=torch.Generator().manual_seed(0),
            )
        )


def _num_images(images: Any, split: str) -> int:
    count = int(getattr(images.reader, "num_samples", 0) or 0) or len(images)
    if not count:
        raise DataError(
            f"the stream does not say how many images its split {split!r} holds: give it as "
            '"SHARDS.tar|COUNT", or add an info.json (see timm on WebDataset)'
        )
    return count


class _Transformed(IterableDataset):
    """Applies a transform; augmentation depends on (seed, epoch, place in the stream of this worker)."""

    def __init__(self, images: Any, transform: Transform, num_classes: int, key: tuple[int, int] | None):
        self.images = images
        self.transform = transform
        self.num_classes = num_classes
        self.key = key

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        info = torch.utils.data.get_worker_info()
        self.images.set_loader_cfg(num_workers=info.num_workers if info else 0)
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for place, (image, label) in enumerate(self.images):
            if not 0 <= int(label) < self.num_classes:
                raise DataError(f"the stream holds an image of class {label}, but has {self.num_classes}")
            if self.key is None:
                yield self.transform(image), int(label)
            else:
                with order.seeded_image(*self.key, first + step * place):
                    transformed = self.transform(image)
                yield transformed, int(label)
