"""What a model is fed: the one rule for a timm model's input size."""

from __future__ import annotations

from torch import nn


def fixed_image_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) that a model is bound to by its patch embedding or position table; None where it takes any size."""
    patch = getattr(model, "patch_embed", None)
    size = getattr(patch, "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that a timm model expects: its fixed size where it has one, else its pretrained_cfg's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    height, width = fixed_image_size(model) or (height, width)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (first.in_channels if first is not None else channels), height, width
