"""The families of the paper keep their blocks, candidates and merged weights, to the last bit.

bits.json was made at commit f96439d, the last one before blocks of any network were found by what they compute:

    python tests/merging/test_same_bits.py --write

Weights come from NumPy's RandomState, whose numbers never change, and from sums and products of them alone. What merges
compute in float64 is rounded once, so that another order of summing changes one float32 in some ten million; the nets
have half a million weights, all candidates together. PyTorch without vectors, with AVX2 and with AVX-512, on one thread
and on two, gave the same. A hash that differs is a failure; write the file anew only for a change that is meant.
"""

import hashlib
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from depthfuse import Supernet, merge
from depthfuse.merging.adapters import find_blocks

import timm  # isort: skip  # after depthfuse, which makes torchvision ready for it
from timm.models._efficientnet_builder import decode_arch_def  # isort: skip
from timm.models.efficientnet import EfficientNet  # isort: skip
from timm.models.resnet import Bottleneck, ResNet  # isort: skip

FILE = Path(__file__).with_name("bits.json")

_RESNET = {"channels": (4, 6, 8, 10), "num_classes": 3}
_CONVNEXT = {"dims": (4, 6, 8, 10), "depths": (1, 1, 2, 1), "num_classes": 3}
_VIT = {"img_size": 24, "patch_size": 8, "embed_dim": 12, "num_heads": 3, "depth": 2, "num_classes": 3}


def efficient(*stages, **arguments):
    """A net of timm's EfficientNet class, whose ready-made ones have 300 times the weights."""
    blocks = decode_arch_def([[stage] for stage in stages])
    return EfficientNet(blocks, num_classes=3, num_features=16, stem_size=8, act_layer=nn.ReLU6, **arguments)


# {net: how it is made}: small members of all four families
NETS = {
    "ResNet, basic": lambda: timm.create_model("resnet18", **_RESNET),
    "ResNet-D, basic": lambda: timm.create_model("resnet18d", **_RESNET),
    "ResNet, bottleneck": lambda: timm.create_model("resnet26", channels=(2, 3, 4, 5), num_classes=3),
    "ResNeXt": lambda: ResNet(
        Bottleneck, (2, 1, 1, 1), channels=(8, 8, 8, 8), cardinality=4, base_width=16, num_classes=3
    ),
    "MobileNetV2": lambda: efficient(
        "ds_r1_k3_s1_c8", "ir_r2_k3_s2_e3_c8", "ir_r2_k5_s1_e2_c16", fix_stem=True
    ),
    "EfficientNet-Edge": lambda: efficient("er_r1_k3_s1_e2_c8", "er_r2_k3_s2_e2_c16", "ir_r1_k5_s2_e2_c16"),
    "ConvNeXt": lambda: timm.create_model("convnext_atto", **_CONVNEXT),
    "ConvNeXt, linear layers": lambda: timm.create_model("convnext_tiny", **_CONVNEXT),
    "ViT": lambda: timm.create_model("vit_tiny_patch16_224", **_VIT),
    "ViT, scaled": lambda: timm.create_model("vit_tiny_patch16_224", init_values=0.3, qk_norm=True, **_VIT),
}
SIDE = {"ViT": 24, "ViT, scaled": 24}  # of images; 33 for the others


@torch.no_grad()
def fill(model):
    """Give every tensor of a model's state numbers that depend on its name and shape alone."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        draw = np.random.RandomState(zlib.crc32(name.encode()))
        values = draw.random_sample(tuple(tensor.shape))  # [0, 1)
        last = name.rpartition(".")[2]
        if last == "running_var" or (last in ("weight", "gamma") and tensor.ndim == 1):
            values = 0.5 + values
        elif last == "weight":
            # about what an initialisation gives, so that the check in `merge` has numbers of ordinary size
            values = (2 * values - 1) / 2 ** (tensor[0].numel().bit_length() // 2)
        else:
            values = 2 * values - 1
        tensor.copy_(torch.from_numpy(values))
    return model


def hash_of(tensors):
    """Of names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(np.ascontiguousarray(tensor.detach().numpy()).tobytes())
    return digest.hexdigest()[:32]


def bits_of(net):
    """{"blocks": what `find_blocks` gives, "merged": {candidate: hash of the model with it wherever it can be}}."""
    model, side = NETS[net]().eval(), SIDE.get(net, 33)
    infos = find_blocks(model)
    supernet = fill(Supernet(fill(model))).eval()  # candidates may look at the weights when they are made
    options = supernet.options()
    merged = {}
    for candidate in dict.fromkeys(c for names in options.values() for c in names):
        supernet.set_choices({path: candidate for path, names in options.items() if candidate in names})
        merged[candidate] = hash_of(merge(supernet, (3, side, side)).state_dict())
    blocks = {info.path: " ".join([info.block_type, *(c.name for c in info.candidates)]) for info in infos}
    return {"blocks": blocks, "merged": merged}


@pytest.mark.parametrize("net", NETS)
def test_the_same_bits_as_before(net):
    wanted = json.loads(FILE.read_text())[net]
    given = bits_of(net)
    assert given["blocks"] == wanted["blocks"]
    assert list(given["blocks"]) == list(wanted["blocks"])  # in the same order, too
    assert given["merged"] == wanted["merged"]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/merging/test_same_bits.py --write")
    FILE.write_text(json.dumps({net: bits_of(net) for net in NETS}, indent=1) + "\n")
