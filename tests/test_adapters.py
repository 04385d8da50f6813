"""Which blocks are found, by type, and the reasons given for the others."""

import pytest
import timm

from depthfuse.adapters import find_blocks


def table(name, **kwargs):
    return find_blocks(timm.create_model(name, **kwargs))


@pytest.mark.parametrize(
    ("name", "kwargs", "blocks", "candidates"),
    [
        ("resnet34", {}, 16, ("compact", "dense")),
        ("resnet50", {}, 16, ("dense",)),
        ("resnext50_32x4d", {}, 16, ("dense",)),
        ("mobilenetv2_100", {}, 17, ("dense",)),
        ("mobilenetv2_140", {}, 17, ("dense",)),
        ("efficientnet_lite0", {}, 16, ("dense",)),
        ("convnext_tiny", {}, 18, ("factorised", "dense")),
        ("deit_tiny_patch16_224", {}, 12, ("ffn",)),
        ("vit_small_patch16_224", {"init_values": 1e-5}, 12, ("ffn",)),
        ("deit_tiny_distilled_patch16_224", {}, 12, ("ffn",)),
    ],
)
def test_all_blocks_of_the_four_families_are_prunable(name, kwargs, blocks, candidates):
    infos = table(name, **kwargs)
    assert len(infos) == blocks
    assert {tuple(c.name for c in info.candidates) for info in infos} == {candidates}


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("seresnet18", {}, "gate depends on the input"),
        ("resnetblur18", {}, "between the convolutions"),
        ("resnet18", {"drop_block_rate": 0.1}, "DropBlock2d between the convolutions"),
        ("efficientnet_b0", {}, "SE gate"),
        ("convnextv2_atto", {}, "GRN"),
        ("tf_efficientnet_lite0", {}, "Conv2dSame"),
        ("swin_tiny_patch4_window7_224", {}, "unknown block type"),
        ("vit_giant_patch14_dinov2", {"depth": 1, "img_size": 28}, "GluMlp"),
        ("regnetx_002", {}, "unknown block type"),
    ],
)
def test_refusals_name_the_reason(name, kwargs, reason):
    reasons = [info.reason for info in table(name, **kwargs) if not info.candidates]
    assert any(reason in text for text in reasons), reasons


def test_drop_path_does_not_stand_in_the_way():
    assert all(info.candidates for info in table("resnet18", drop_path_rate=0.1))


def test_a_model_of_unknown_making_gives_an_empty_table():
    from torch import nn

    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
