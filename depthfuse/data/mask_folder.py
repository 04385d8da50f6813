"""A folder of images with masks: SPLIT/images/NAME.jpg beside SPLIT/masks/NAME.png, whose pixels are class indices.

Each pair is decoded and resized once, to a square, and kept in memory: four bytes a pixel of the resized images.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from depthfuse.data import decoding, folder
from depthfuse.data.bundle import DataBundle
from depthfuse.data.config import DataConfig
from depthfuse.data.images import DECODE_ERRORS
from depthfuse.data.scanning import shown
from depthfuse.data.targets import IGNORED
from depthfuse.data.tensors import bundle_of_tensors
from depthfuse.data.transforms import InputFormat
from depthfuse.errors import DataError

_INDEXED = ("L", "P", "1")  # Pillow's modes of which a pixel is a number: grey, a palette's entry, a bit


def open_mask_folder(config: DataConfig, format: InputFormat) -> DataBundle:
    """The data of such a folder. Classes are numbered from 0 to the largest of any mask; 255 counts nowhere.

    Raises:
        DataError: naming the folder or file that is missing, has no partner, or cannot be used.
    """
    root = Path(config.data)
    splits = [folder.split_folder(root, split) for split in (config.train_split, config.val_split)]
    if splits[0].samefile(splits[1]):
        raise DataError(f"{splits[0]} would be trained on and measured on: name another val_split")
    train, val = (_read(split, format) for split in splits)
    masks = torch.cat([train[1].flatten(), val[1].flatten()])
    known = masks[masks != IGNORED]
    if not len(known):
        raise DataError(f"all pixels of all masks in {root} are {IGNORED}, which counts nowhere")
    names = [str(number) for number in range(int(known.max()) + 1)]
    return bundle_of_tensors(
        config, names, train, val, in_chans=format.in_chans, mean=format.mean, std=format.std
    )


def _read(split: Path, format: InputFormat) -> tuple[Tensor, Tensor]:
    """(images [N, C, S, S] uint8, masks [N, S, S] uint8), in the order of their names."""
    images, masks = (_by_stem(split / name) for name in ("images", "masks"))
    for name in sorted(images.keys() ^ masks.keys()):
        missing = "mask" if name in images else "image"
        raise DataError(
            f"{split} has no {missing} of the name {shown(name)!r} (images/NAME.jpg, masks/NAME.png)"
        )
    pairs = [_pair(images[name], masks[name], format) for name in images]
    return torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs])


def _by_stem(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise DataError(f"{directory} does not exist: a split of masks needs the folders images and masks")
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        if path.stem in found:
            raise DataError(
                f"{shown(str(path))} and {shown(found[path.stem].name)} are of one name: keep one"
            )
        found[path.stem] = path
    if not found:
        raise DataError(f"{directory} is empty")
    return found


def _pair(image_path: Path, mask_path: Path, format: InputFormat) -> tuple[Tensor, Tensor]:
    """(image [C, S, S] uint8, mask [S, S] uint8)."""
    size = format.img_size, format.img_size
    image = _decoded(image_path, lambda opened: decoding.to_mode(opened, format.pillow_mode))
    mask = _decoded(mask_path, _indices)
    if mask.size != image.size:
        raise DataError(f"the mask {shown(str(mask_path))} has {mask.size} pixels, its image {image.size}")
    pixels = np.array(image.resize(size, Image.Resampling.BILINEAR), dtype=np.uint8)
    classes = np.array(mask.resize(size, Image.Resampling.NEAREST), dtype=np.uint8)
    return torch.from_numpy(pixels).view(*size, -1).movedim(-1, 0), torch.from_numpy(classes)


def _decoded(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with decoding.open_image(str(path)) as opened:
            return convert(opened)
    except DECODE_ERRORS as error:
        raise DataError(f"cannot read {shown(str(path))}: {error}. Repair or remove it") from error


def _indices(opened: Image.Image) -> Image.Image:
    """The numbers of the pixels as they are: a palette's colours do not matter."""
    if opened.mode not in _INDEXED:
        raise DataError(
            f"it is of Pillow's mode {opened.mode}, where a mask is 8 bits a pixel, in grey or with a palette"
        )
    return opened.copy()
