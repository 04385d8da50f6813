"""The ResNets for CIFAR-10 of He et al. (CVPR 2016, section 4.2), and published weights for them as a file.

git clone https://github.com/akamaster/pytorch_resnet_cifar10
python -m benchmarks.pruning.cifar_resnet pytorch_resnet_cifar10/pretrained_models/resnet56-4bfd9763.th \
    --out resnet56.safetensors
depthfuse prune --model benchmarks.pruning.cifar_resnet:resnet56 --weights resnet56.safetensors \
    --data.data FOLDER --search.speedup 1.5

The net that papers on pruning layers report on. Its widths change without a convolution in the shortcut (option A of
the paper): every second pixel, and zeros for the new channels.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from depthfuse.errors import CheckpointError

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a shortcut without weights: (N, before, H, W) to (N, width, H / stride, W / stride)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padded_channels = (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padded_channels:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.padded_channels, self.padded_channels),
            )
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """(N, 3, 32, 32) images to (N, num_classes) logits; 6 n + 2 layers for n blocks in each of three stages."""

    def __init__(self, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        before = WIDTHS[0]
        for stage, width in enumerate(WIDTHS, 1):
            blocks = []
            for block in range(blocks_per_stage):
                blocks.append(BasicBlock(before, width, 2 if stage > 1 and block == 0 else 1))
                before = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """0.27 million parameters."""
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """0.85 million parameters."""
    return CifarResNet(9, num_classes)


def renamed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors by the names that they have here.

    Raises:
        CheckpointError: tensors that are missing, too many, or of another shape.
    """
    stripped = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    blocks = len({name.split(".")[1] for name in stripped if name.startswith("layer1.")})
    wanted = CifarResNet(blocks, num_classes=10).state_dict()
    # Of before PyTorch 0.4, which did not count batches.
    counts = {name: count for name, count in wanted.items() if name.endswith("num_batches_tracked")}
    stripped = counts | stripped
    if stripped.keys() != wanted.keys():
        odd = sorted(stripped.keys() ^ wanted.keys())
        raise CheckpointError(f"not a ResNet for CIFAR-10 of this form: {', '.join(odd[:3])} differ")
    for name, like in wanted.items():
        if stripped[name].shape != like.shape:
            raise CheckpointError(f"{name} is {list(stripped[name].shape)}, expected {list(like.shape)}")
    return {name: stripped[name].contiguous() for name in wanted}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("published", type=Path, help="a file of pytorch_resnet_cifar10/pretrained_models")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    args = parser.parse_args()
    try:
        given = torch.load(args.published, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{args.published} is no file with a state_dict: {error}") from None
    tensors = renamed(given)
    save_file(tensors, args.out)
    print(f"written: {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB), {len(tensors)} tensors")


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        raise SystemExit(f"cifar_resnet: {error}") from None
