"""Small nets of every family that blocks are fitted in, and images that are smooth as photos are."""

import timm
import torch
from torch import nn

FAMILIES = {
    "resnet18": {"channels": (8, 12, 16, 24), "layers": (1, 2, 1, 1)},
    "resnet26": {"channels": (4, 8, 8, 16), "layers": (1, 1, 1, 1)},
    "mobilenetv2_035": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)},
    "deit_tiny_patch16_224": {"depth": 4, "embed_dim": 24, "num_heads": 2, "img_size": 32},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 1, 1, 1), "embed_dim": 16},
}


def net_of(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **FAMILIES[name])
    size = FAMILIES[name].get("img_size", 32)
    with torch.no_grad():  # statistics of what it sees, and branches that do something
        for module in net.modules():
            scale = getattr(module, "gamma", None)
            if isinstance(scale, nn.Parameter):
                scale.fill_(0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
        for x in images(size, 6, seed=1):
            net.train()(x)
    return net.eval(), size


def images(size, count=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    smooth = nn.AvgPool2d(3, 1, 1)
    return [3 * smooth(torch.randn(8, 3, size, size, generator=rng)) for _ in range(count)]
