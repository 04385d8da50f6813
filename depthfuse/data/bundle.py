"""`DataBundle`: the loaders that training, search and measurement use, the same for every kind of data."""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from timm.data import Mixup
from torch import Tensor

from depthfuse.data import order
from depthfuse.data.answers import Answered, check_answers
from depthfuse.data.config import DataConfig
from depthfuse.data.images import ImageSource
from depthfuse.data.pixels import PixelSource
from depthfuse.data.transforms import InputFormat
from depthfuse.errors import DataError

# images [B, C, S, S] float32; classes [B] int64, or what else the task takes (depthfuse.data.targets)
Batch = tuple[Tensor, Tensor]


class Batches:
    """Batches that can be gone through several times, each time the same. `len` where it is known."""

    def __init__(self, make: Callable[[], Iterator[Batch]], count: int):
        self._make = make
        self._count = count

    def __iter__(self) -> Iterator[Batch]:
        return self._make()

    def __len__(self) -> int:
        return self._count


class SeededMixup:
    """timm's mixup and cutmix, whose draws depend on (seed, iteration) alone."""

    def __init__(self, mixup: Mixup):
        self._mixup = mixup

    def __call__(self, images: Tensor, labels: Tensor, *, seed: int, iteration: int) -> tuple[Tensor, Tensor]:
        """Mix a batch, in place.

        Args:
            images: [B, C, S, S], B even; changed.
            labels: [B] int64.
            seed, iteration: what the draws depend on.

        Returns:
            the images, and soft targets [B, num_classes] float32.
        """
        with order.seeded_mix(seed, iteration):
            return self._mixup(images, labels)


class DataBundle(ABC):
    """A data set, ready for a model.

    Attributes:
        num_classes, class_names: of the data.
        in_chans, img_size, mean, std: of the images that the loaders give.
        labelled: whether images have their targets. Those of `IndexedBundle` may lack them until it is `answered`.
    """

    labelled = True

    def __init__(self, config: DataConfig, class_names: list[str], format: InputFormat):
        self.config = config
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.in_chans = format.in_chans
        self.img_size = format.img_size
        self.mean = format.mean
        self.std = format.std

    @abstractmethod
    def train_batches(self, world_size: int = 1) -> int:
        """Batches of an epoch, for each of `world_size` processes; what does not fill one is dropped.

        Raises:
            DataError: not even one batch.
        """

    @abstractmethod
    def train_loader(
        self, *, seed: int, epoch: int, start_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batches:
        """Augmented training batches of an epoch, from `start_batch` on; only the arguments matter."""

    @abstractmethod
    def val_loader(self) -> Batches:
        """All validation images, not augmented, in a fixed order."""

    @abstractmethod
    def holdout_loader(self) -> Batches:
        """Images kept out of training, not augmented, in a fixed order.

        Raises:
            DataError: there are none.
        """

    @abstractmethod
    def calibration_loader(self, num_images: int) -> Batches:
        """A fixed choice of training images, not augmented, classes mixed, in batches of equal size."""

    def batched(self, batch_size: int | None) -> "DataBundle":
        """The same data with so many images in a training batch; None for as many as before.

        Raises:
            DataError: a size that the settings do not allow, or more images than there are.
        """
        if batch_size is None or batch_size == self.config.batch_size:
            return self
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, batch_size=batch_size)
        other.train_batches()  # raises if there is not one
        return other

    def mixup(self, label_smoothing: float = 0.0) -> SeededMixup | None:
        """Mixup or cutmix where the config asks for it, else None. It does the label smoothing itself."""
        if not (self.config.mixup or self.config.cutmix):
            return None
        return SeededMixup(
            Mixup(
                mixup_alpha=self.config.mixup,
                cutmix_alpha=self.config.cutmix,
                label_smoothing=label_smoothing,
                num_classes=self.num_classes,
            )
        )

    def _count_batches(self, num_images: int, world_size: int) -> int:
        batches = num_images // (self.config.batch_size * world_size)
        if batches == 0:
            raise DataError(
                f"{num_images} training images of {self.config.data} do not fill one batch of "
                f"{self.config.batch_size} on {world_size} process(es): choose a smaller batch_size"
            )
        return batches


def equal_batch_size(num_images: int, largest: int) -> int:
    """The size that divides the images into the fewest equal batches of at most `largest`."""
    return num_images // -(-num_images // largest)


class IndexedBundle(DataBundle):
    """Data with random access: the order of an epoch is a permutation, and resuming skips without decoding.

    Args:
        train, val, holdout: sources of images; `holdout` may be `train` itself.
        train_positions, val_positions, holdout_positions: [N] int64 each, what to take of them.
        train_labels: [N'] int64, the class of each position of `train`, or None if unknown.
        labelled: whether the sources know what to learn of each image; see `answered`.
    """

    def __init__(
        self,
        config: DataConfig,
        class_names: list[str],
        format: InputFormat,
        *,
        train: PixelSource | ImageSource,
        train_positions: Tensor,
        train_labels: Tensor | None,
        holdout: PixelSource | ImageSource,
        holdout_positions: Tensor,
        val: PixelSource | ImageSource,
        val_positions: Tensor,
        labelled: bool = True,
    ):
        super().__init__(config, class_names, format)
        self.labelled = labelled
        self._train: PixelSource | ImageSource | Answered = train
        self.train_positions, self._train_labels = train_positions, train_labels
        self._holdout: PixelSource | ImageSource | Answered = holdout
        self.holdout_positions = holdout_positions
        self._val: PixelSource | ImageSource | Answered = val
        self.val_positions = val_positions
        self.train_batches()  # raises if there is not one

    def train_batches(self, world_size: int = 1) -> int:
        return self._count_batches(len(self.train_positions), world_size)

    def train_loader(
        self, *, seed: int, epoch: int, start_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Batches:
        count = self.train_batches(world_size)
        size = self.config.batch_size
        shuffled = order.epoch_order(self.train_positions, seed, epoch)
        batches = [
            shuffled[(batch * world_size + rank) * size :][:size] for batch in range(start_batch, count)
        ]
        return Batches(lambda: iter(self._train.train_batches(batches, seed, epoch)), len(batches))

    def val_loader(self) -> Batches:
        return self._eval_loader(self._val, self.val_positions)

    def holdout_loader(self) -> Batches:
        if len(self.holdout_positions) == 0:
            raise DataError(
                f"no images of {self.config.data} are held out (holdout is {self.config.holdout}): "
                "the search needs some; raise holdout or name a holdout_split"
            )
        return self._eval_loader(self._holdout, self.holdout_positions)

    def calibration_loader(self, num_images: int) -> Batches:
        chosen = order.balanced(self.train_positions, self._train_labels, num_images)
        size = equal_batch_size(len(chosen), self.config.val_batch_size)
        return self._eval_loader(self._train, chosen[: len(chosen) // size * size], size)

    def questions(self) -> dict[str, Batches]:
        """All images of each part, not augmented, in a fixed order: what `answered` wants the classes of."""
        return {name: self._eval_loader(source, where) for name, (source, where) in self._parts().items()}

    def answered(self, answers: Mapping[str, Tensor], where: str) -> "IndexedBundle":
        """The same data with classes that somebody else gives, whatever it had before.

        Args:
            answers: {part: [N] int64}, the class of each image of `questions`, in its order.
            where: they come from, for messages.

        Raises:
            DataError: answers for other images, or of classes that the data does not have.
        """
        parts = self._parts()
        sizes = {name: len(positions) for name, (_, positions) in parts.items()}
        check_answers(answers, sizes, self.num_classes, where)
        given = {name: Answered(*part, answers[name]) for name, part in parts.items()}
        bundle = copy.copy(self)
        bundle._train, bundle._holdout, bundle._val = given["train"], given["holdout"], given["val"]
        bundle.labelled = True
        return bundle

    def _parts(self) -> dict[str, tuple[PixelSource | ImageSource | Answered, Tensor]]:
        """{part: (its source, its positions there)}."""
        return {
            "train": (self._train, self.train_positions),
            "holdout": (self._holdout, self.holdout_positions),
            "val": (self._val, self.val_positions),
        }

    def _eval_loader(
        self, source: PixelSource | ImageSource | Answered, positions: Tensor, batch_size: int | None = None
    ) -> Batches:
        batches = list(torch.split(positions, batch_size or self.config.val_batch_size))
        return Batches(lambda: iter(source.eval_batches(batches)), len(batches))
