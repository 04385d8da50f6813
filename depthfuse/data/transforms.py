"""From a Pillow image to a normalised tensor, for training and for evaluation, with timm's transforms."""

from dataclasses import dataclass
from typing import Any

import timm.data
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from depthfuse.data.config import DataConfig
from depthfuse.data.images import Transform
from depthfuse.errors import DataError


@dataclass(frozen=True)
class InputFormat:
    """What a model wants to be fed."""

    in_chans: int
    img_size: int  # side of the square, pixels
    mean: tuple[float, ...]  # [in_chans], on a scale where white is 1
    std: tuple[float, ...]  # [in_chans]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @property
    def pillow_mode(self) -> str:
        return "L" if self.in_chans == 1 else "RGB"


def resolve_format(config: DataConfig, in_chans: int, model_cfg: dict[str, Any] | None) -> InputFormat:
    """The input format from timm's `pretrained_cfg` of a model, overridden by the config."""
    resolved = timm.data.resolve_data_config(
        {"img_size": config.img_size, "in_chans": in_chans, "crop_pct": config.crop_pct},
        pretrained_cfg=model_cfg or {},
    )
    height, width = resolved["input_size"][-2:]
    if height != width:
        raise DataError(f"the model takes {height}x{width} pixels; set img_size, only squares are supported")
    return InputFormat(
        in_chans=in_chans,
        img_size=height,
        mean=_per_channel(resolved["mean"], in_chans),
        std=_per_channel(resolved["std"], in_chans),
        interpolation=resolved["interpolation"],
        crop_pct=resolved["crop_pct"],
        crop_mode=resolved["crop_mode"],
    )


def _per_channel(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """Colour statistics serve a grey image by their average; grey ones serve every channel."""
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def build(config: DataConfig, format: InputFormat) -> tuple[Transform, Transform]:
    """The transforms for (training, evaluation). Raises DataError for an `auto_augment` that timm refuses."""
    evaluation = timm.data.create_transform(
        (format.in_chans, format.img_size, format.img_size),
        is_training=False,
        interpolation=format.interpolation,
        mean=format.mean,
        std=format.std,
        crop_pct=format.crop_pct,
        crop_mode=format.crop_mode,
    )
    if config.augment == "none":
        return evaluation, evaluation
    if config.augment == "light":
        return _light(format), evaluation
    try:
        training = timm.data.create_transform(
            (format.in_chans, format.img_size, format.img_size),
            is_training=True,
            auto_augment=config.auto_augment,
            re_prob=config.reprob,
            re_mode="pixel",
            interpolation="random",
            mean=format.mean,
            std=format.std,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise DataError(f"timm refused auto_augment {config.auto_augment!r}: {error}") from error
    return training, evaluation


def to_pixels(format: InputFormat) -> Transform:
    """The resizing and cropping of evaluation alone: Pillow image -> [C, S, S] uint8."""
    return timm.data.create_transform(
        (format.in_chans, format.img_size, format.img_size),
        is_training=False,
        interpolation=format.interpolation,
        crop_pct=format.crop_pct,
        crop_mode=format.crop_mode,
        normalize=False,
    )


def shift_padding(img_size: int) -> int:
    """How far light augmentation shifts images, pixels."""
    return max(1, img_size // 8)


def _light(format: InputFormat) -> Transform:
    """Resize the shorter side, pad by an eighth, crop at random, flip at random."""
    return transforms.Compose(
        [
            transforms.Resize(format.img_size, str_to_interp_mode(format.interpolation)),
            transforms.RandomCrop(format.img_size, padding=shift_padding(format.img_size)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(format.mean, format.std),
        ]
    )
