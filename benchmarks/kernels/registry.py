"""The operators of the four networks, at their shapes: as they come from timm, and with every block merged.

    layers("resnet34", merged=True, batch=128)  ->  {"layer1.0": Conv2dCase(...), ...}

Shapes are read off the real network, run on the meta device, so that no table of them can go stale.
"""

import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace

import torch
from torch import nn

import depthfuse  # noqa: F401  before timm, which needs its torchvision remedy
from benchmarks.kernels.block_cases import (
    AttentionCase,
    DepthwisePointwiseCase,
    InvertedResidualCase,
    MlpCase,
    PoolLinearCase,
)
from benchmarks.kernels.cases import Case, Conv2dCase, DepthwiseCase, LinearCase, WinogradCase
from depthfuse.kernels import depthwise_pointwise, inverted_residual, mlp

import timm  # isort: skip

NETWORKS = ("resnet34", "mobilenetv2_100", "mobilenetv2_140", "convnext_tiny", "deit_tiny_patch16_224")
IMAGE_SIZE = 224
CLASSES = 1000
BATCHES = (1, 128)


@dataclass(frozen=True)
class Seen:
    """A module and the shape of what it was given."""

    module: nn.Module
    shape: tuple[int, ...]


@functools.cache
def _trace(network: str) -> dict[str, Seen]:
    """Every module of the network that ran, by name, with its input's shape at batch 1."""
    with torch.device("meta"):
        model = timm.create_model(network).eval()
        image = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    seen: dict[str, Seen] = {}

    def note(name: str, module: nn.Module, inputs: tuple) -> None:
        seen.setdefault(name, Seen(module, tuple(inputs[0].shape)))

    hooks = [
        m.register_forward_pre_hook(functools.partial(note, name))
        for name, m in model.named_modules()
        if name
    ]
    model(image)
    for hook in hooks:
        hook.remove()
    return seen


def layers(network: str, merged: bool, batch: int) -> dict[str, Case]:
    """Layer name -> operator, in the order of execution, for `batch` images of 224 x 224.

    Activations and skips are those that the fused operator takes in: of a pair conv-act it is one case.

    Args:
        merged: every block that can be merged, merged to the form that pays (factorised for ConvNeXt).
    """
    seen = _trace(network)
    blocks = {name: s for name, s in seen.items() if type(s.module).__name__ in _BLOCKS}
    cases: dict[str, Case] = {}
    for name, entry in seen.items():
        owner = next((b for b in blocks if name == b or name.startswith(b + ".")), None)
        if name in blocks:
            rows = _BLOCKS[type(entry.module).__name__](entry, merged, batch)
            cases |= {f"{name}.{part}" if part else name: case for part, case in rows.items()}
        elif owner is None and isinstance(entry.module, nn.Conv2d | nn.Linear):
            cases[name] = _plain(entry, batch, act=_STEM_ACTIVATIONS.get(name, "none"))
    return cases


def blocks(network: str, merged: bool, batch: int) -> dict[str, Case]:
    """Block name -> the operator that runs a block, or its MLP, in one launch, where there is one."""
    fused = {}
    for name, entry in _trace(network).items():
        kind = type(entry.module).__name__
        build = _FUSED_BLOCKS.get(f"merged {kind}" if merged else kind)
        case = build(entry, batch) if build else None
        if case is not None:
            fused[name] = case
        if kind == "SelectAdaptivePool2d":
            _, channels, size, _ = entry.shape
            norm = network.startswith("convnext")
            fused["classifier"] = PoolLinearCase(batch, channels, size, CLASSES, norm)
    return fused


def unique_cases(network: str, batch: int) -> dict[Case, list[str]]:
    """Each distinct operator of the network, merged and not, with the layers or blocks that it serves."""
    found: dict[Case, list[str]] = {}
    for merged in (False, True):
        remark = ", merged" if merged else ""
        for name, case in layers(network, merged, batch).items():
            found.setdefault(case, []).append(f"{name}{remark}")
            if type(case) is Conv2dCase and _suits_winograd(case):
                found.setdefault(WinogradCase(*astuple(case)), []).append(f"{name} (Winograd{remark})")
        for name, case in blocks(network, merged, batch).items():
            found.setdefault(case, []).append(f"{name} (fused{remark})")
    return found


def _suits_winograd(case: Conv2dCase) -> bool:
    """3x3 of stride 1, with so many channels that products and not loads are the limit."""
    return (case.kernel, case.stride) == (3, 1) and min(case.channels, case.out_channels) >= 128


_STEM_ACTIVATIONS = {"conv1": "relu", "conv_stem": "relu6", "conv_head": "relu6"}


def _plain(entry: Seen, batch: int, act: str = "none", residual: bool = False, affine: bool = False) -> Case:
    """A convolution or linear layer as it is."""
    module, shape = entry.module, entry.shape
    if isinstance(module, nn.Linear):
        rows = batch * shape[1] if len(shape) == 3 else batch
        if len(shape) == 4:  # channels-last images, as ConvNeXt's MLP has them
            rows = batch * shape[1] * shape[2]
        return LinearCase(rows, module.in_features, module.out_features, act, residual, affine)
    kind = DepthwiseCase if module.groups > 1 else Conv2dCase
    padding = module.padding[0]
    return kind(
        batch,
        module.in_channels,
        shape[2],
        module.out_channels,
        module.kernel_size[0],
        module.stride[0],
        padding,
        act,
        residual,
        affine,
    )


def _basic_block(entry: Seen, merged: bool, batch: int) -> dict[str, Case]:
    block, shape = entry.module, entry.shape
    first, second, stride = block.conv1, block.conv2, block.conv1.stride[0]
    if merged:
        case = Conv2dCase(batch, shape[1], shape[2], second.out_channels, 3, stride, 1, "relu", False, True)
        return {"": case}
    middle = Seen(second, (1, first.out_channels, shape[2] // stride, shape[2] // stride))
    rows = {
        "conv1": _plain(Seen(first, shape), batch, "relu"),
        "conv2": _plain(middle, batch, "relu", residual=True),
    }
    if block.downsample is not None:
        rows["downsample"] = _plain(Seen(block.downsample[0], shape), batch)
    return rows


def _inverted_residual(entry: Seen, merged: bool, batch: int) -> dict[str, Case]:
    block, shape = entry.module, entry.shape
    stride = block.conv_dw.stride[0]
    small = (1, 0, shape[2] // stride, shape[2] // stride)
    if merged:
        out = getattr(block, "conv_pwl", None) or block.conv_pw
        return {
            "": Conv2dCase(batch, shape[1], shape[2], out.out_channels, 3, stride, 1, "relu6", False, True)
        }
    if not hasattr(block, "conv_pwl"):  # depthwise separable
        rows = {
            "conv_dw": _plain(Seen(block.conv_dw, shape), batch, "relu6"),
            "conv_pw": _plain(Seen(block.conv_pw, small), batch, residual=block.has_skip),
        }
    else:
        rows = {
            "conv_pw": _plain(Seen(block.conv_pw, shape), batch, "relu6"),
            "conv_dw": _plain(Seen(block.conv_dw, shape), batch, "relu6"),
            "conv_pwl": _plain(Seen(block.conv_pwl, small), batch, residual=block.has_skip),
        }
    return rows


def _convnext_block(entry: Seen, merged: bool, batch: int) -> dict[str, Case]:
    block, shape = entry.module, entry.shape
    depthwise = _plain(Seen(block.conv_dw, shape), batch)
    if not merged:
        depthwise = replace(depthwise, norm=True)
    channels_last = (1, shape[2], shape[3], shape[1])
    if merged:
        rows = batch * shape[2] * shape[3]
        return {"conv_dw": depthwise, "fc": LinearCase(rows, shape[1], shape[1], "gelu", True, True)}
    return {
        "conv_dw": depthwise,
        "mlp.fc1": _plain(Seen(block.mlp.fc1, channels_last), batch, "gelu"),
        "mlp.fc2": _plain(Seen(block.mlp.fc2, channels_last), batch, residual=True),
    }


def _vit_block(entry: Seen, merged: bool, batch: int) -> dict[str, Case]:
    block, shape = entry.module, entry.shape
    rows: dict[str, Case] = {
        "attn.qkv": replace(_plain(Seen(block.attn.qkv, shape), batch), norm=not merged),
        "attn": AttentionCase(batch, shape[1], block.attn.num_heads, block.attn.head_dim),
        "attn.proj": _plain(Seen(block.attn.proj, shape), batch, residual=True),
    }
    if merged:
        return rows | {"mlp.fc": LinearCase(batch * shape[1], shape[2], shape[2], "gelu", False, True)}
    return rows | {
        "mlp.fc1": replace(_plain(Seen(block.mlp.fc1, shape), batch, "gelu"), norm=True),
        "mlp.fc2": _plain(Seen(block.mlp.fc2, (1, shape[1], 0)), batch, residual=True),
    }


_BLOCKS: dict[str, Callable[[Seen, bool, int], dict[str, Case]]] = {
    "BasicBlock": _basic_block,
    "DepthwiseSeparableConv": _inverted_residual,
    "InvertedResidual": _inverted_residual,
    "ConvNeXtBlock": _convnext_block,
    "Block": _vit_block,
}


def _fused_inverted_residual(entry: Seen, batch: int) -> Case | None:
    block, (_, channels, size, _) = entry.module, entry.shape
    hidden, out_channels, stride = (
        block.conv_dw.in_channels,
        block.conv_pwl.out_channels,
        block.conv_dw.stride[0],
    )
    if not inverted_residual.supports(channels, out_channels, block.conv_dw.kernel_size[0], stride):
        return None
    return InvertedResidualCase(batch, channels, size, hidden, out_channels, stride, block.has_skip)


def _fused_separable(entry: Seen, batch: int) -> Case | None:
    block, (_, channels, size, _) = entry.module, entry.shape
    kernel, out_channels = block.conv_dw.kernel_size[0], block.conv_pw.out_channels
    if block.conv_dw.stride[0] != 1 or not depthwise_pointwise.supports(out_channels):
        return None
    shape = (batch, channels, size, out_channels, kernel)
    return DepthwisePointwiseCase(*shape, "relu6", "none", block.has_skip, False)


def _fused_convnext_mlp(entry: Seen, batch: int) -> Case | None:
    _, channels, height, width = entry.shape
    if not mlp.supports(channels, channels, torch.float16):
        return None
    return MlpCase(batch * height * width, channels, entry.module.mlp.fc1.out_features, norm=False)


def _merged_convnext(entry: Seen, batch: int) -> Case | None:
    _, channels, size, _ = entry.shape
    if not depthwise_pointwise.supports(channels):
        return None
    return DepthwisePointwiseCase(batch, channels, size, channels, 7, "none", "gelu", True, True)


def _fused_vit_mlp(entry: Seen, batch: int) -> Case | None:
    _, tokens, channels = entry.shape
    if not mlp.supports(channels, channels, torch.float16):
        return None
    return MlpCase(batch * tokens, channels, entry.module.mlp.fc1.out_features, norm=True)


# Block type, or "merged" and block type: how it runs in one launch.
_FUSED_BLOCKS: dict[str, Callable[[Seen, int], Case | None]] = {
    "InvertedResidual": _fused_inverted_residual,
    "DepthwiseSeparableConv": _fused_separable,
    "ConvNeXtBlock": _fused_convnext_mlp,
    "merged ConvNeXtBlock": _merged_convnext,
    "Block": _fused_vit_mlp,
}
