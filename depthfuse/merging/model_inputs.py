"""What a model is fed, and where: the one rule for a model's input size, also where another model holds it, and that
its parameters lie on one device.

Others wrap timm's models: timm itself where only features are asked for, Hugging Face's TimmWrapper, your own.
"""

from __future__ import annotations

import torch
from torch import nn

from depthfuse.errors import DepthfuseError, SpecError


def fixed_image_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) that a model, or the one inside it, is bound to by its patch embedding or position table; None where it
    takes any size.
    """
    for module in model.modules():
        timm = getattr(getattr(module, "patch_embed", None), "img_size", None)
        hugging_face = getattr(getattr(module, "patch_embeddings", None), "image_size", None)
        torchvision = (
            getattr(module, "image_size", None) if type(module).__name__ == "VisionTransformer" else None
        )
        for size in (timm, hugging_face, torchvision):
            if size is not None:
                height, width = (size, size) if isinstance(size, int) else size
                return int(height), int(width)
    return None


def known_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) that a model, or the one inside it, was made for, or None where it does not say.

    Its fixed size where it has one, else that of timm's pretrained_cfg; as many channels as its first layer takes.
    """
    for holder in model.modules():
        config = getattr(holder, "pretrained_cfg", None) or getattr(holder, "default_cfg", None)
        size = config.get("input_size") if isinstance(config, dict) else None
        if size is not None:
            break
    else:
        holder, size = model, None
    fixed = fixed_image_size(model)
    if size is None and fixed is None:
        return None
    channels, height, width = size or (3, 224, 224)
    height, width = fixed or (height, width)
    return getattr(holder, "in_chans", None) or _first_channels(model) or channels, height, width


def _first_channels(model: nn.Module) -> int | None:
    """What the first convolution takes; one of many channels sits behind a patch embedding of another kind."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.groups == 1 and first.in_channels <= 16 else None


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that a model expects; 224 pixels, and as many channels as its first layer takes, where it does not
    say.
    """
    return known_input_size(model) or (_first_channels(model) or 3, 224, 224)


def check_one_device(
    model: nn.Module, error: type[DepthfuseError] = SpecError, needs_values: bool = False
) -> None:
    """Raise `error` where the parameters of a model lie on several devices, naming two of them; with `needs_values`
    also where they lie on "meta", which keeps shapes only.

    Parameters without dimensions are not asked: PyTorch takes them from the CPU anywhere. Nor is a model of shapes,
    inside `depthfuse.shapes.ShapesOnly`, which has both kinds.
    """
    if torch.empty(0).is_meta:
        return
    places: dict[str, str] = {}  # {device: one of its parameters}
    for name, parameter in model.named_parameters():
        if parameter.ndim:
            places.setdefault(str(parameter.device), name)
    (here, first), *others = places.items() or [("", "")]
    lost = "meta" in places and (needs_values or len(places) > 1)
    load = "what is on meta has no values: load its weights first, as with load_state_dict(..., assign=True)"
    if others:
        there, second = others[0]
        todo = load if lost else "move all of it to one, model.to(device)"
        raise error(
            f"{type(model).__name__} lies on more than one device, {first} on {here} and {second} on {there}: {todo}"
        )
    if lost:
        raise error(f"{type(model).__name__} lies on meta: {load}")
