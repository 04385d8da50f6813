"""Which data, and how it is prepared: one frozen dataclass, which is also the command line and the YAML."""

from dataclasses import dataclass
from typing import Literal

from depthfuse.errors import DataError


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are prepared."""

    data: str = "fashion-mnist"
    """"fashion-mnist" (embedded), "shapes" (generated, with the classes, masks or boxes that the task needs), a folder
    with a sub-folder for each split and in it one for each class (for segmentation: images/NAME.jpg and masks/NAME.png,
    of class indices; images without classes lie directly in the splits, or all in the folder: the original net's own
    answers are their targets), a data set of timm's factory ("torch/cifar10",
    "hfds/NAME", "wds/NAME", ...), or a function of your own, package.module:function: called with this DataConfig and
    the model's input channels it gives a depthfuse.data.DataBundle."""
    data_dir: str | None = None
    """Root folder of a named data set; for a folder of images give `data` alone."""
    train_split: str = "train"
    """For a folder of images, the name of a sub-folder of it."""
    val_split: str = "validation"
    """For a folder of images, the name of a sub-folder; val, valid, eval and test are tried too."""
    holdout_split: str | None = None
    """A split to score the search on, in place of a share of the training images. Streams need it."""
    download: bool = False
    """Let torchvision and Hugging Face fetch a named data set."""
    input_key: str | None = None
    """Name of the image column of an "hfds/", "hfids/" or "wds/" data set, where it is not the usual one."""
    target_key: str | None = None
    """The same for the label column."""
    img_size: int | None = None
    """Side of the square input in pixels. Default: the model's; 28 for the embedded images."""
    crop_pct: float | None = None
    """Share of the resized image that evaluation keeps. Default: the model's."""
    batch_size: int = 128
    """Training images per step and process."""
    val_batch_size: int = 256
    """Images per step wherever nothing is trained."""
    workers: int = 0
    """Processes that decode images; results do not depend on it (for streams, their order does)."""
    in_memory: bool = False
    """Decode and resize each image once and keep it as uint8: for small images, of which an epoch is over faster than
    they can be decoded. Crops and flips are then of the resized image. Not for streams, nor augment "imagenet"."""
    holdout: float = 0.05
    """Share of the training images, class by class, that is kept out of training to score the search."""
    max_train_images: int | None = None
    """Use a class-balanced part of the training images only."""
    augment: Literal["none", "light", "imagenet"] = "light"
    """With "light", flip and shifted crop; with "imagenet", timm's random resized crop, colour jitter and the
    next two."""
    auto_augment: str | None = None
    """timm's AutoAugment or RandAugment string, such as "rand-m9-mstd0.5"; with augment "imagenet"."""
    reprob: float = 0.0
    """Probability of random erasing; with augment "imagenet"."""
    mixup: float = 0.0
    """Alpha of mixup; 0 turns it off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 turns it off."""

    def __post_init__(self) -> None:
        for name, minimum in (("batch_size", 1), ("val_batch_size", 1), ("workers", 0)):
            if getattr(self, name) < minimum:
                raise DataError(f"{name} must be at least {minimum}, not {getattr(self, name)}")
        for name in ("img_size", "max_train_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} must be positive, not {value}")
        if not 0 <= self.holdout < 1:
            raise DataError(f"holdout is a share of the training images, in [0, 1), not {self.holdout}")
        if self.augment not in ("none", "light", "imagenet"):
            raise DataError(f'augment must be "none", "light" or "imagenet", not {self.augment!r}')
        if self.augment != "imagenet" and (self.auto_augment or self.reprob):
            raise DataError(f'auto_augment and reprob need augment "imagenet", not {self.augment!r}')
        if self.in_memory and self.augment == "imagenet":
            raise DataError(
                'in_memory keeps resized images, but augment "imagenet" needs the original: choose one'
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise DataError(f"mixup and cutmix pair the images of a batch: {self.batch_size} is odd")
