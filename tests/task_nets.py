"""A segmenter and a detector on a small ResNet of timm's, and the settings for a run of each in some seconds."""

import dataclasses

import timm
import torch.nn.functional as F
from small_run import CONFIG
from torch import Tensor, nn

from depthfuse.data import DataConfig


class Net(nn.Module):
    """Features of strides 8 and 16 in one map of stride 8, and a layer that reads it."""

    def __init__(self, outputs: int):
        super().__init__()
        sizes = {"channels": (8, 12, 16, 16), "layers": (1, 1, 1, 1)}
        self.backbone = timm.create_model("resnet18", features_only=True, out_indices=(2, 3), **sizes)
        self.narrow = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in (12, 16))
        self.head = nn.Conv2d(16, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = (narrow(map) for narrow, map in zip(self.narrow, self.backbone(x), strict=True))
        return self.head(F.relu(fine + F.interpolate(coarse, fine.shape[-2:])))


class Segmenter(Net):
    """As torchvision's, a dictionary; the logits are smaller than the image."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(x)}


def build_segmenter(num_classes: int = 3) -> nn.Module:
    return Segmenter(num_classes)


def build_detector(num_classes: int = 2) -> nn.Module:
    net = Net(4 + num_classes)
    nn.init.constant_(net.head.bias[4:], -3.0)  # few cells hold an object
    return net


def config_of(task: str):
    model = {"segmentation": "task_nets:build_segmenter", "detection": "task_nets:build_detector"}[task]
    data = DataConfig(data="shapes", img_size=32, max_train_images=256, batch_size=32, holdout=0.125)
    return dataclasses.replace(CONFIG, model=model, model_kwargs=(), task=task, data=data)
