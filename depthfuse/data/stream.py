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

    In training each process reads a share of its own, by the arguments of `train_loader`. In evaluation and calibration
    every reader gives all images in full batches, in whatever process and with however many workers; who scores which
    batch is decided in `training.evaluation` alone. timm's readers would divide by themselves, by the process group.

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
        self._num_train = _num_images(self._open(config.train_split), config.train_split)
        self.train_batches()  # raises if there is not one

    def train_batches(self, world_size: int = 1) -> int:
        return self._count_batches(self._num_train, world_size)

    def train_loader(
        self, *, seed: int, epoch: int, start_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batches:
        stop = self.train_batches(world_size)
        self._check_shares(world_size)

        def batches() -> Iterator[Batch]:
            images = self._open(self.config.train_split, True, seed, rank, world_size)
            images.set_epoch(epoch)
            stream = _Transformed(
                images,
                self._train_transform,
                self.num_classes,
                key=(seed, epoch),
                rank=rank,
                world_size=world_size,
            )
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
            stop = -(-_num_images(self._open(split), split) // size)

        def batches() -> Iterator[Batch]:
            stream = _Transformed(self._open(split), self._eval_transform, self.num_classes, key=None)
            # each worker's last batch is a small one, which would take a full one's place
            full = _rebatched(self._load(stream, size, drop_last=False), size)
            yield from itertools.islice(full, stop)

        return Batches(batches, stop)

    def _open(
        self, split: str, is_training: bool = False, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> Any:
        """timm's data set, the share of one process of `world_size`; all of it by default."""
        images = self._open_split(split, is_training, seed)
        reader = images.reader
        if not (hasattr(reader, "dist_rank") and hasattr(reader, "dist_num_replicas")):
            raise DataError(
                f"{type(reader).__name__} of this version of timm cannot be told which share of "
                f"{self.config.data} to read: use the version of timm that depthfuse names"
            )
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
        if hasattr(reader, "batch_size"):  # to whole batches of which it rounds up
            reader.batch_size = self.config.batch_size
        return images

    def _check_shares(self, world_size: int) -> None:
        """Raise DataError where timm's reader would leave a process without images, or give several the same."""
        workers, kind = max(1, self.config.workers), self.config.data.partition("/")[0].lower()
        if kind == "wds":  # whole shards are dealt out
            shards = len(self._open(self.config.train_split).reader.split_info.filenames)
            if shards < world_size * workers:
                raise DataError(
                    f"the {shards} shards of {self.config.train_split!r} are too few for {world_size} processes with "
                    f"{workers} worker(s) each, which read whole shards: use fewer of them, or cut more shards"
                )
        if kind == "tfds" and world_size > 1 and self.config.workers == 0:
            raise DataError(
                "timm divides a TFDS data set among processes only where workers read it: set workers to 1 or more"
            )

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


def _rebatched(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The same images in batches of `size`; only the last may be smaller."""
    parts: list[Batch] = []
    held = 0
    for images, labels in batches:
        while len(labels):
            taken = min(size - held, len(labels))
            parts.append((images[:taken], labels[:taken]))
            images, labels, held = images[taken:], labels[taken:], held + taken
            if held == size:
                yield _joined(parts)
                parts, held = [], 0
    if parts:
        yield _joined(parts)


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _num_images(images: Any, split: str) -> int:
    count = int(getattr(images.reader, "num_samples", 0) or 0) or len(images)
    if not count:
        raise DataError(
            f"the stream does not say how many images its split {split!r} holds: give it as "
            '"SHARDS.tar|COUNT", or add an info.json (see timm on WebDataset)'
        )
    return count


class _Transformed(IterableDataset):
    """Applies a transform; augmentation depends on (seed, epoch, process, place in the stream of this worker)."""

    def __init__(
        self,
        images: Any,
        transform: Transform,
        num_classes: int,
        key: tuple[int, int] | None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images = images
        self.transform = transform
        self.num_classes = num_classes
        self.key = key
        self.rank, self.world_size = rank, world_size

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
                number = (
                    first + step * place
                ) * self.world_size + self.rank  # no two processes draw the same
                with order.seeded_image(*self.key, number):
                    transformed = self.transform(image)
                yield transformed, int(label)
