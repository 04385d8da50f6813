"""A `DataBundle` of tensors in memory: for data of a user's own, and for generated data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from depthfuse.data import order
from depthfuse.data.bundle import IndexedBundle
from depthfuse.data.config import DataConfig
from depthfuse.data.pixels import PixelSource
from depthfuse.data.targets import form_of
from depthfuse.data.transforms import InputFormat, shift_padding
from depthfuse.errors import DataError


def bundle_of_tensors(
    config: DataConfig,
    class_names: Sequence[str],
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    in_chans: int | None = None,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.25,
) -> IndexedBundle:
    """Images and targets that are in memory, as data to prune with.

    Args:
        config: batch sizes, `holdout` (a share of the training images), `max_train_images`, and `augment`: "light"
            (flips and shifts, of masks and boxes too) or "none".
        class_names: of the data.
        train, val: (images [N, C, S, S] uint8, targets [N, ...]): classes, masks or boxes as in
            `depthfuse.data.targets`, or anything that a task of your own takes, with augment "none".
        in_chans: of the model; 3 repeats single-channel images.
        mean, std: of each channel, or of all, on a scale where white is 1.

    Raises:
        DataError: naming what does not fit.
    """
    images, targets = train
    for name, (some, of_them) in (("train", train), ("val", val)):
        if some.ndim != 4 or some.dtype != torch.uint8 or some.shape[2] != some.shape[3]:
            raise DataError(f"{name} images are [N, C, S, S] uint8, not {list(some.shape)} {some.dtype}")
        if some.shape[1:] != images.shape[1:] or len(some) != len(of_them):
            raise DataError(
                f"{name} holds images {list(some.shape)} and targets {list(of_them.shape)}: as many of both are "
                "expected, and images as those of train"
            )
    size, channels = images.shape[-1], in_chans or images.shape[1]
    if config.img_size not in (None, size):
        raise DataError(
            f"the images have {size} pixels a side, and img_size is {config.img_size}: leave it out"
        )
    if config.holdout_split is not None:
        raise DataError("there are no splits to hold out: use holdout, a share of the training images")
    if config.augment == "imagenet" or (config.augment == "light" and form_of(targets) is None):
        raise DataError(
            f"augment {config.augment!r} cannot move such targets with their images ({list(targets.shape)} "
            f'{targets.dtype}): choose "none"'
        )
    mean, std = (tuple(float(v) for v in torch.as_tensor(given).expand(channels)) for given in (mean, std))
    sources = [
        PixelSource(
            *given,
            img_size=size,
            in_chans=channels,
            mean=mean,
            std=std,
            augment=config.augment == "light",
            padding=shift_padding(size),
        )
        for given in (train, val)
    ]
    labels = targets if form_of(targets) == "classes" else None
    positions, held_out = order.divide(
        torch.arange(len(images)), labels, config.max_train_images, config.holdout
    )
    return IndexedBundle(
        config,
        list(class_names),
        InputFormat(channels, size, mean, std, "bilinear", 1.0, "center"),
        train=sources[0],
        train_positions=positions,
        train_labels=labels,
        holdout=sources[0],
        holdout_positions=held_out,
        val=sources[1],
        val_positions=torch.arange(len(val[0])),
    )
