"""Which blocks are found, by type, and the reasons given for the others."""

import pytest
import timm

from depthfuse.merging.adapters import find_blocks

VIT = ("ffn", "attention", "linear", "idle", "no_act", "drop")


def table(name, **kwargs):
    return find_blocks(timm.create_model(name, **kwargs))


@pytest.mark.parametrize(
    ("name", "kwargs", "blocks", "candidates"),
    [
        ("resnet34", {}, 16, ("compact", "dense", "identity", "drop")),
        ("resnet50", {}, 16, ("dense", "compact", "drop")),
        ("resnext50_32x4d", {}, 16, ("dense", "compact", "drop")),
        ("mobilenetv2_100", {}, 17, ("dense", "compact", "drop")),
        ("mobilenetv2_140", {}, 17, ("dense", "compact", "drop")),
        ("efficientnet_lite0", {}, 16, ("dense", "compact", "drop")),
        ("convnext_tiny", {}, 18, ("factorised", "dense", "compact", "drop")),
        ("deit_tiny_patch16_224", {}, 12, VIT),
        ("vit_small_patch16_224", {"init_values": 1e-5}, 12, VIT),
        ("deit_tiny_distilled_patch16_224", {}, 12, VIT),
    ],
)
def test_all_blocks_of_the_four_families_are_prunable(name, kwargs, blocks, candidates):
    infos = table(name, **kwargs)
    assert len(infos) == blocks
    offered = {tuple(c.name for c in info.candidates) for info in infos}
    # blocks that change the shape cannot be dropped
    assert candidates in offered and offered <= {candidates, tuple(c for c in candidates if c != "drop")}
    assert all(
        ("drop: no identity skip" in info.reason) == (len(info.candidates) < len(candidates))
        for info in infos
    )


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("seresnet18", {}, "gate depends on the input"),
        ("resnetblur18", {}, "between the convolutions"),
        ("resnet18", {"drop_block_rate": 0.1}, "DropBlock2d between the convolutions"),
        ("efficientnet_b0", {}, "SE gate"),
        ("convnextv2_atto", {}, "GRN"),
        ("tf_efficientnet_lite0", {}, "Conv2dSame"),
        ("regnety_002", {}, "a gate depends on the input"),
    ],
)
def test_refusals_name_the_reason(name, kwargs, reason):
    reasons = [info.reason for info in table(name, **kwargs) if not info.candidates]
    assert any(reason in text for text in reasons), reasons


@pytest.mark.parametrize(
    ("name", "kwargs", "left_out", "reason"),
    [
        ("vit_giant_patch14_dinov2", {"depth": 1, "img_size": 28}, ("ffn", "linear", "idle"), "ffn: GluMlp"),
        ("resnet50d", {}, ("compact",), "compact: the shortcut reads 2 pixels"),
        (
            "resnet18",
            {"block_reduce_first": 2},
            ("identity",),
            "identity: the second convolution has",
        ),
    ],
)
def test_some_candidates_do_not_suit_a_block(name, kwargs, left_out, reason):
    infos = [info for info in table(name, **kwargs) if reason in info.reason]
    assert infos
    for info in infos:
        assert info.candidates and not {c.name for c in info.candidates} & set(left_out)


def test_kernels_that_do_not_lie_centred_cannot_shrink():
    model = timm.create_model("resnet18")
    model.layer1[0].conv2.padding = (0, 0)
    info = find_blocks(model)[0]
    assert [c.name for c in info.candidates] == ["dense", "drop"] and "does not lie centred" in info.reason


def test_nothing_but_dropping_is_no_offer():
    """The first candidate is the default, and dropping must not be."""
    assert all(info.candidates[:1] == () for info in table("convnextv2_atto"))


def test_drop_path_does_not_stand_in_the_way():
    assert all(info.candidates for info in table("resnet18", drop_path_rate=0.1))


def test_a_model_of_unknown_making_gives_an_empty_table():
    from torch import nn

    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
