"""Nets for tests: small members of each family, and random batch norm state."""

import random

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from depthfuse import ModelSource, Supernet
from depthfuse.merging.variants import block_inputs

# (model, kwargs, side of the image): one of each block type, with strides, channel changes and odd maps
SMALL = {
    "resnet": ("resnet18", {"channels": (8, 12, 16, 24), "num_classes": 7}, 45),
    "resnet_d": ("resnet18d", {"channels": (8, 12, 16, 24), "num_classes": 7}, 46),
    "bottleneck_d": ("resnet26d", {"channels": (4, 6, 8, 10), "num_classes": 7}, 45),
    "dilated": ("resnet18", {"channels": (8, 8, 8, 8), "output_stride": 8, "num_classes": 7}, 45),
    "mobilenet": ("mobilenetv2_035", {"num_classes": 7}, 65),
    "lite": ("tf_efficientnet_lite0", {"num_classes": 7}, 65),
    "edge": ("efficientnet_es", {"num_classes": 7}, 65),
    "convnext": ("convnext_atto", {"num_classes": 7, "dims": (8, 12, 16, 20), "depths": (1, 1, 2, 1)}, 65),
    "convnext_linear": (
        "convnext_tiny",
        {"num_classes": 7, "dims": (8, 12, 16, 20), "depths": (1, 1, 2, 1)},
        65,
    ),
    "vit": (
        "deit_tiny_patch16_224",
        {"img_size": 24, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 3, "num_classes": 7},
        24,
    ),
    "vit_scaled": (
        "vit_small_patch16_224",
        {
            "img_size": 24,
            "patch_size": 8,
            "embed_dim": 24,
            "num_heads": 3,
            "depth": 2,
            "init_values": 0.3,
            "qk_norm": True,
        },
        24,
    ),
}


def build(family: str):
    """(model, (C, H, W)) with random weights and batch norm statistics, in eval mode."""
    name, kwargs, side = SMALL[family]
    torch.manual_seed(0)
    model = ModelSource.make(name, **kwargs).build().eval()
    return randomise_norms(randomise_branches(model)), (3, side, side)


def randomise_branches(model):
    """Linear layers and LayerScales of the size that training gives them; timm's start near zero and hide mistakes."""
    for path, module in model.named_modules():
        gamma = getattr(module, "gamma", None)
        if isinstance(gamma, torch.nn.Parameter):
            torch.nn.init.uniform_(gamma, 0.3, 1)
        if isinstance(module, torch.nn.Linear) or path.endswith((".fc1", ".fc2")):
            torch.nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    return model


def randomise_norms(model):
    """Random statistics and affine weights, as training would leave them; ImageNet-trained nets are in this range."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model


def random_subnet(model, seed=0, everything=False):
    """A supernet in eval mode with random norms and random choices; at least one block pruned."""
    supernet = randomise_norms(Supernet(model)).eval()
    rng = random.Random(seed)
    options = supernet.options()
    choices = (
        {path: rng.choice(names) for path, names in options.items()} if everything else supernet.sample(rng)
    )
    first = next(iter(options))
    if all(choice == "keep" for choice in choices.values()):
        choices[first] = options[first][0]
    supernet.set_choices(choices)
    return supernet


def each_candidate(supernet, x):
    """(path, name, switch, what the block sees of images x) for every candidate of every block, switched on in turn."""
    seen = block_inputs(supernet, x)
    for path, block in supernet.blocks.items():
        for name in block.candidates:
            block.choice, block.lam, block.mixing = name, 0.0, "op"
            yield path, name, block, seen[path]
        block.choice, block.lam = "keep", 0.0
