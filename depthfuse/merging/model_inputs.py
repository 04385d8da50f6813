"""What a model is fed: the one rule for a timm model's input size."""

from __future__ import annotations

from torch import nn


def fixed_image_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) that a model is bound to by its patch embedding or position table; None where it takes any size."""
    patch = getattr(model, "patch_embed", None)
    size = getattr(patch, "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def known_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) that a timm model was made for, or None where it does not say.

    Its fixed size where it has one, else its pretrained_cfg's; as many channels as its first layer takes.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size")
    if size is None:
        return None
    channels, height, width = size
    height, width = fixed_image_size(model) or (height, width)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    # a first convolution of many channels sits behind a patch embedding of another kind
    if first is not None and first.groups == 1 and first.in_channels <= 16:
        channels = first.in_channels
    return getattr(model, "in_chans", None) or channels, height, width


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that a timm model expects; 3 channels and 224 pixels where it does not say."""
    return known_input_size(model) or (3, 224, 224)
