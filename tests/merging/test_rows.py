"""Neighbouring convolutions of a plain row become one block."""

import pytest
import torch
from merged_twins import every_candidate_merges_exactly, the_path_begins_at_the_original
from nets import randomise_norms
from torch import nn

from depthfuse import Supernet, _torchvision, merge
from depthfuse.errors import MergeError
from depthfuse.merging.adapters import find_blocks

SIZE = (3, 32, 32)


def row(*widths, norm=True):
    layers, before = [], 3
    for width in widths:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [
            nn.Conv2d(before, width, 3, padding=1),
            *([nn.BatchNorm2d(width)] if norm else []),
            nn.ReLU(True),
        ]
        before = width
    return nn.Sequential(*layers)


class Plain(nn.Module):
    def __init__(self, features, channels=8):
        super().__init__()
        self.features, self.head = features, nn.Linear(channels, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class TakesApart(Plain):
    """Reads features in the middle, as a perceptual loss does."""

    def forward(self, x):
        taken = 0
        for layer in self.features:
            x = layer(x)
            taken = taken + x.mean()
        return self.head(x.mean((2, 3))) + taken


def test_pairs_are_counted_from_the_end_of_each_run():
    torch.manual_seed(0)
    model = randomise_norms(Plain(row(8, "pool", 8, 8, "pool", 12, 12, 12, "pool", 8, 8))).eval()
    infos = find_blocks(model)
    assert [(info.path, info.length) for info in infos] == [
        ("features.4", 6),
        ("features.14", 6),
        ("features.21", 6),
    ]
    every_candidate_merges_exactly(model, 3, SIZE, {})
    the_path_begins_at_the_original(model, SIZE)


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg16_bn"])
def test_torchvision(name):
    _torchvision.ensure()
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, num_classes=5)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(256 if name == "alexnet" else 512, 5)
    every_candidate_merges_exactly(
        randomise_norms(model).eval(), {"alexnet": 1, "vgg11": 3, "vgg16_bn": 5}[name], (3, 64, 64), {}
    )


@pytest.mark.parametrize("name", ["RepVggBlock", "MobileOneBlock"])
def test_blocks_whose_branches_are_one(name):
    byobnet = pytest.importorskip("timm").models.byobnet
    make = getattr(byobnet, name)
    torch.manual_seed(0)
    model = Plain(nn.Sequential(make(3, 8, stride=2), *(make(8, 8) for _ in range(5)))).eval()
    assert all("reparameterize_model" in info.reason for info in find_blocks(randomise_norms(model)))
    model = pytest.importorskip("timm").utils.reparameterize_model(model)
    every_candidate_merges_exactly(model, 3, SIZE, {})


def test_short_rows_are_no_such_thing():
    """A stem of three convolutions is what it was before rows were known: one chain, or none."""
    infos = find_blocks(Plain(row(8, 8, "pool", 8, "pool", 8)).eval())
    assert all(info.length == 1 for info in infos)


def test_a_row_that_is_taken_apart_says_so():
    torch.manual_seed(0)
    model = TakesApart(row(8, 8, "pool", 8, 8, "pool", 8, 8)).eval()
    supernet = Supernet(model).eval()
    assert len(supernet.blocks) == 3
    with pytest.raises(TypeError, match="call it whole"):
        supernet(torch.randn(1, *SIZE))
    with pytest.raises(MergeError, match="call it whole"):
        merge(supernet, SIZE)
    model(torch.randn(1, *SIZE))  # the model itself is as it was


def test_a_kept_pair_computes_what_it_did():
    torch.manual_seed(0)
    model = randomise_norms(Plain(row(8, 8, "pool", 8, 8, "pool", 8, 8))).eval()
    supernet = Supernet(model).eval()
    supernet.set_choices({"features.0": "dense"})
    subnet = supernet.subnet(supernet.spec())
    assert list(subnet.blocks) == ["features.0"]
    merged, x = merge(subnet, SIZE), torch.randn(2, *SIZE)
    torch.testing.assert_close(merged(x), subnet(x))
    assert type(merged) is Plain
