"""`open_data`: from a `DataConfig` to a `DataBundle`, with every fault of the data named here and now."""

import functools
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor
from torchvision.transforms import Compose

from depthfuse import origins
from depthfuse.data import decoding, embedded, folder, order, scanning, shapes, transforms
from depthfuse.data.bundle import DataBundle, IndexedBundle
from depthfuse.data.config import DataConfig
from depthfuse.data.images import ArrayImages, DecodedImages, ImageSource, class_names
from depthfuse.data.mask_folder import open_mask_folder
from depthfuse.data.pixels import DecodedOnce, PixelSource
from depthfuse.data.stream import StreamBundle
from depthfuse.data.targets import Targets
from depthfuse.data.transforms import InputFormat
from depthfuse.errors import DataError

EMBEDDED = "fashion-mnist"
_STREAMS = ("hfids", "tfds", "wds")
_NAMED = ("torch", "hfds", *_STREAMS)
# torchvision's reader of class folders, by timm's two names; it orders classes otherwise than timm's own.
_TORCHVISION_FOLDERS = ("torch/image_folder", "torch/folder")

# Of a folder of images without classes and without splits.
_VALIDATION_SHARE = 0.1

# Of the 10,000 embedded training images (the script that cut them is benchmarks/cut_fashion_mnist.py).
_EMBEDDED_MEAN, _EMBEDDED_STD = 0.2863, 0.3526


def open_data(
    config: DataConfig,
    *,
    num_classes: int | None,
    in_chans: int = 3,
    model_cfg: dict[str, Any] | None = None,
    targets: Targets = "classes",
) -> DataBundle:
    """Open a data set for a model.

    Args:
        config: which data, and how it is prepared.
        num_classes: outputs of the model, which must be the classes of the data; None does not check. Images without
            classes need it: their bundle is not `labelled` until it is `answered`.
        in_chans: input channels of the model, 1 or 3.
        model_cfg: the model's `pretrained_cfg`: size, normalisation and crop of its input.
        targets: what is to be learned of an image. "shapes" have all three, a folder classes or masks, data of the
            user's own what it likes, and all else classes.

    Raises:
        DataError: naming what is missing, empty, unknown, or does not fit.
        SpecError: data of the user's own that may not be imported (`depthfuse.allow_origin`), or cannot be.
    """
    if in_chans not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, but the model takes {in_chans}")
    if config.data == shapes.NAME:
        bundle = shapes.open_shapes(config, in_chans, targets)
    elif origins.is_own(config.data):
        bundle = _open_own(config, in_chans)
    elif targets == "masks" and Path(config.data).is_dir():
        bundle = open_mask_folder(config, transforms.resolve_format(config, in_chans, model_cfg))
    elif targets != "classes":
        raise DataError(
            f"{config.data} has a class for each image, and {targets} are needed: {shapes.NAME} has some, a "
            "folder may have masks (SPLIT/images, SPLIT/masks), or give data of your own, package.module:function"
        )
    elif config.data == EMBEDDED:
        bundle = _open_embedded(config, in_chans)
    else:
        format = transforms.resolve_format(config, in_chans, model_cfg)
        if _prefix(config.data) in _STREAMS:
            bundle = _open_stream(config, format, num_classes)
        else:
            bundle = _open_indexed(config, format, num_classes)
    check_fits(bundle, num_classes, in_chans, targets)
    return bundle


def check_fits(
    bundle: DataBundle, num_classes: int | None, in_chans: int, targets: Targets = "classes"
) -> None:
    """Raise DataError unless data has the classes and channels of a model, and something to tell apart."""
    name = bundle.config.data
    if bundle.in_chans != in_chans:
        raise DataError(
            f"{name} gives images of {bundle.in_chans} channel(s), and the model takes {in_chans}"
        )
    if bundle.num_classes < 2 and targets != "boxes":
        raise DataError(
            f"{name} has {'one single class' if bundle.num_classes else 'no class'}, and there is nothing to "
            "tell apart: a classifier needs two classes"
        )
    if num_classes is not None and num_classes != bundle.num_classes:
        shown = ", ".join(bundle.class_names[:5]) + (", ..." if bundle.num_classes > 5 else "")
        raise DataError(
            f"the model has {num_classes} classes, but {name} has {bundle.num_classes} ({shown}): "
            f"build the model with num_classes={bundle.num_classes}"
        )


def _open_own(config: DataConfig, in_chans: int) -> DataBundle:
    """Data of the user's own: what package.module:factory gives."""
    factory = origins.imported(config.data)
    try:
        bundle = factory(config, in_chans)
    except DataError:
        raise
    except Exception as error:  # the user's own code
        raise DataError(
            f"{config.data}, called with a DataConfig and {in_chans} input channels, failed: {type(error).__name__} "
            f"{error}"
        ) from error
    if not isinstance(bundle, DataBundle):
        raise DataError(f"{config.data} gave a {type(bundle).__name__}, expected a depthfuse.data.DataBundle")
    return bundle


def _open_embedded(config: DataConfig, in_chans: int) -> DataBundle:
    size = config.img_size or embedded.IMAGE_SIZE
    format = InputFormat(
        in_chans, size, (_EMBEDDED_MEAN,) * in_chans, (_EMBEDDED_STD,) * in_chans, "bilinear", 1.0, "center"
    )
    sources: list[PixelSource | ImageSource] = []
    for split in ("train", "test"):
        images, labels = embedded.load(split)
        if config.augment == "imagenet":
            pillow_images = ArrayImages(images, labels, format.pillow_mode)
            sources.append(ImageSource(pillow_images, *transforms.build(config, format), config.workers))
        else:
            sources.append(
                PixelSource(
                    images,
                    labels,
                    img_size=size,
                    in_chans=in_chans,
                    mean=_EMBEDDED_MEAN,
                    std=_EMBEDDED_STD,
                    augment=config.augment == "light",
                )
            )
    if config.holdout_split is not None:
        raise DataError(f"{EMBEDDED} has no split {config.holdout_split!r}: use holdout, a share of training")
    labels = embedded.load("train")[1]
    positions, held_out = _divide(config, labels, torch.arange(len(labels)))
    return IndexedBundle(
        config,
        list(embedded.CLASS_NAMES),
        format,
        train=sources[0],
        train_positions=positions,
        train_labels=labels,
        holdout=sources[0],
        holdout_positions=held_out,
        val=sources[1],
        val_positions=torch.arange(len(embedded.load("test")[1])),
    )


def has_no_classes(config: DataConfig) -> bool:
    """Whether the data is a folder of images without class folders, in its splits or, without any, in itself."""
    other = config.data in (EMBEDDED, shapes.NAME) or _prefix(config.data) in _NAMED
    return (
        not other
        and Path(config.data).is_dir()
        and scanning.is_unsorted(_folder_of(config, config.train_split))
    )


def _folder_of(config: DataConfig, split: str) -> Path:
    """The folder of a split; of images without classes the whole where there are no splits."""
    root = Path(config.data)
    whole = not folder.has_split(root, split) and scanning.is_unsorted(root)
    return root if whole else folder.split_folder(root, split)


def _open_indexed(config: DataConfig, format: InputFormat, num_classes: int | None) -> DataBundle:
    """Folders of images, torchvision data sets, Hugging Face data sets on disk."""
    if _prefix(config.data) not in _NAMED:
        _check_path(config)
    both = transforms.build(config, format)
    unsorted = has_no_classes(config)
    if unsorted and num_classes is None:
        raise DataError(
            f"images lie directly in {_folder_of(config, config.train_split)}: sort them into one sub-folder for each "
            "class, or say how many classes the net has that shall answer for them (num_classes)"
        )

    def open_split(split: str) -> tuple[DecodedImages, Tensor | None, list[str]]:
        if unsorted:
            images = DecodedImages(scanning.scan_unsorted(_folder_of(config, split)), format.pillow_mode)
            return images, images.labels(), [str(number) for number in range(num_classes or 0)]
        images = DecodedImages(_create(config, split), format.pillow_mode)
        names = images.class_names()
        try:
            labels = images.labels()
        except ValueError as error:
            raise DataError(
                f"labels of the split {split!r} of {config.data} are not usable: {error}"
            ) from error
        if labels is not None and not names:
            names = [str(number) for number in range(int(labels.max()) + 1)]
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            raise DataError(
                f"the split {split!r} of {config.data} has labels from {int(labels.min())} to {int(labels.max())}, "
                f"where 0 to {len(names) - 1} are expected; a negative one often marks an image without a class"
            )
        return images, labels, names

    def make_source(images: DecodedImages, labels: Tensor | None) -> ImageSource | PixelSource:
        if not config.in_memory:
            return ImageSource(images, *both, config.workers)
        if labels is None:
            raise DataError(f"{config.data} does not tell its labels without decoding: leave in_memory out")
        size = format.img_size
        pixels = DecodedOnce(images, transforms.to_pixels(format), (format.in_chans, size, size))
        return PixelSource(
            pixels,
            labels,
            img_size=size,
            in_chans=format.in_chans,
            mean=format.mean,
            std=format.std,
            augment=config.augment == "light",
            padding=transforms.shift_padding(size),
        )

    train_images, labels, class_names = open_split(config.train_split)

    def open_other(split: str) -> ImageSource | PixelSource:
        images, other_labels, names = open_split(split)
        folder.check_same_classes(class_names, names, config.train_split, split)
        _check_apart(config, train_images.items, images.items, split)
        return make_source(images, other_labels)

    train = make_source(train_images, labels)
    if unsorted:
        labels = None  # none of them is known
    positions = torch.arange(len(train_images))
    if unsorted and not folder.has_split(Path(config.data), config.train_split):
        positions, val_positions = _divide_whole(config, positions)
        val = train
    else:
        val = open_other(config.val_split)
        val_positions = torch.arange(len(val.images))
    positions, held_out = _divide(config, labels, positions)
    if config.holdout_split is None:
        holdout = train
    else:
        holdout = open_other(config.holdout_split)
        held_out = torch.arange(len(holdout.images))
    return IndexedBundle(
        config,
        class_names,
        format,
        train=train,
        train_positions=positions,
        train_labels=labels,
        holdout=holdout,
        holdout_positions=held_out,
        val=val,
        val_positions=val_positions,
        labelled=not unsorted,
    )


def _divide_whole(config: DataConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions for (training, validation) of a folder without splits: a choice that depends on the number alone."""
    if config.holdout_split is not None:
        raise DataError(
            f"{config.data} has no splits, and so no {config.holdout_split!r}: leave holdout_split out"
        )
    train, val = order.split_holdout(positions, None, _VALIDATION_SHARE)
    if not len(val):
        raise DataError(
            f"{config.data} holds {len(positions)} images, too few to keep a tenth for validation"
        )
    return train, val


def _check_apart(config: DataConfig, train: Any, other: Any, split: str) -> None:
    """Raises DataError if images of another split are training images too."""
    shared = None
    if isinstance(train, scanning.FolderImages):
        shared = train.shared_with(other)
    # torchvision's small sets take every other name for that of their test part.
    elif split == config.train_split or getattr(train, "train", None) is getattr(other, "train", ...):
        shared = f"{config.train_split} = {split}"
    if shared is not None:
        raise DataError(
            f"the split {split!r} of {config.data} holds images of the split {config.train_split!r}, which are trained "
            f"on ({scanning.shown(shared)}): it would measure nothing; give it images of its own"
        )


def _open_stream(config: DataConfig, format: InputFormat, num_classes: int | None) -> DataBundle:
    if config.in_memory:
        raise DataError(f"{config.data} is a stream, which is not kept in memory: leave in_memory out")

    def open_split(split: str, is_training: bool, seed: int) -> Any:
        return _create(config, split, is_training=is_training, seed=seed, input_img_mode=reader_mode)

    # TensorFlow decodes by itself; the others give Pillow images, which are left to us as they are.
    reader_mode = format.pillow_mode if _prefix(config.data) == "tfds" else ""
    for split in (config.val_split, config.holdout_split):
        if split == config.train_split:
            raise DataError(f"{split!r} of {config.data} is trained on and measured on: name another split")
    names = class_names(open_split(config.train_split, False, 0).reader)
    if not names and num_classes is None:
        raise DataError(f"the stream {config.data} does not name its classes: the model must say how many")
    to_mode = functools.partial(decoding.to_mode, mode=format.pillow_mode)
    train_transform, eval_transform = (
        Compose([to_mode, transform]) for transform in transforms.build(config, format)
    )
    return StreamBundle(
        config,
        names or [str(number) for number in range(num_classes or 0)],
        format,
        open_split=open_split,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _divide(config: DataConfig, labels: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions for (training, holdout), after `max_train_images`."""
    share = config.holdout if config.holdout_split is None else 0.0
    return order.divide(positions, labels, config.max_train_images, share)


def _prefix(data: str) -> str:
    prefix, slash, _ = data.partition("/")
    return prefix.lower() if slash else ""


def _check_path(config: DataConfig) -> None:
    path = Path(config.data)
    if path.is_dir():
        return
    known = f"{EMBEDDED}, {shapes.NAME}, a folder of images, or {', '.join(prefix + '/NAME' for prefix in _NAMED)}"
    if path.exists():
        raise DataError(f"{path} is a file, where a data set is expected: {known}")
    if path.is_absolute() or config.data.startswith(".") or len(path.parts) > 1:
        raise DataError(f"the folder {path} does not exist; data can be {known}")
    raise DataError(f"unknown data set {config.data!r}, and no such folder exists; known are {known}")


def _create(config: DataConfig, split: str, **stream: Any) -> Any:
    """The images of a split, without a transform: of a folder, or timm's data set."""
    wanted = {"input_key": config.input_key, "target_key": config.target_key}
    keys: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    if _prefix(config.data) not in _NAMED:
        return scanning.scan(folder.split_folder(Path(config.data), split))
    if config.data.lower() in _TORCHVISION_FOLDERS:
        if config.data_dir is None or not Path(config.data_dir).is_dir():
            raise DataError(
                f"{config.data} needs the folder of its splits as data_dir, not {config.data_dir}"
            )
        return scanning.scan(folder.split_folder(Path(config.data_dir), split), natural=False)
    try:
        dataset = timm.data.create_dataset(
            config.data,
            root=config.data_dir,
            split=split,
            download=config.download,
            batch_size=config.batch_size,
            **keys,
            **stream,
        )
    # timm hands over to five libraries, and each reports an unknown name, a missing file or a missing
    # package in its own way.
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot open the split {split!r} of {config.data} (data_dir {config.data_dir}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(getattr(dataset, "train", None), bool) and split not in folder.USUAL_SPLITS:
        raise DataError(f"{config.data} has the splits train and test, but not {split!r}")
    return dataset
