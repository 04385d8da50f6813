"""Merging must change nothing: exact in float64, the same answers in float32, at full size and on odd maps."""

import copy
import random

import pytest
import timm
import torch
from nets import SMALL, build, random_subnet, randomise_norms
from torch import nn

from depthfuse import ModelSource, Supernet, merge
from depthfuse.merge import MergeError, fold_batch_norms, merged_structure
from depthfuse.variants import block_inputs

FULL_SIZE = ["resnet34", "mobilenetv2_100", "mobilenetv2_140", "convnext_tiny", "deit_tiny_patch16_224"]


def relative_error(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("everything", [True, False])
@torch.no_grad()
def test_merged_equals_unmerged(family, everything):
    model, size = build(family)
    for seed in range(1 if everything else 2):
        subnet = random_subnet(model, seed, everything).double()
        merged = merge(subnet, size)
        x = torch.randn(2, *size, dtype=torch.float64)
        assert relative_error(merged(x), subnet(x)) <= 1e-10
        assert type(merged) is type(model)
        for name in (n for n, c in subnet.choices().items() if c != "keep"):
            assert not any(isinstance(m, Supernet) for m in merged.get_submodule(name).modules())


@pytest.mark.parametrize("candidate_index", [0, 1])
@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_every_block_alone_with_every_candidate(family, candidate_index):
    """Per block, so that a deep net cannot hide an error; borders are compared like the interior."""
    model, size = build(family)
    supernet = randomise_norms(Supernet(model)).eval().double()
    seen = block_inputs(supernet, torch.randn(2, *size, dtype=torch.float64))
    checked = 0
    for path, block in supernet.blocks.items():
        names = list(block.candidates)
        if candidate_index >= len(names):
            continue
        block.choice = names[candidate_index]
        # maps down to one pixel: the border is then everything
        for side in (1, 2, 5) if seen[path].ndim == 4 else (0,):
            x = (
                seen[path]
                if side == 0
                else torch.randn(*seen[path].shape[:2], side, side + 1, dtype=torch.float64)
            )
            assert relative_error(block.fuse()(x), block(x)) <= 1e-12, (path, block.choice, side)
            checked += 1
    assert checked or candidate_index == 1


@pytest.mark.parametrize("name", FULL_SIZE)
@torch.no_grad()
def test_full_size_nets(name):
    """The nets of the paper at 224 px: bit-equal baseline, 1e-10 in float64, the same class on 256 float32 inputs."""
    torch.manual_seed(0)
    model = randomise_norms(ModelSource.make(name).build().eval())
    supernet = Supernet(model).eval()
    x = torch.randn(256, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    assert torch.equal(supernet(x[:4]), model(x[:4]))
    randomise_norms(supernet)
    supernet.set_choices(supernet.sample(random.Random(3)))
    merged = merge(supernet)  # compares in float64 at 224 px
    report = merged.merge_report
    assert max(report.output, *(max(b.border, b.interior) for b in report.blocks)) <= 1e-10
    for batch in x.split(32):
        assert torch.equal(merged(batch).argmax(-1), supernet(batch).argmax(-1))


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "convnext", "vit"])
@torch.no_grad()
def test_merged_model_keeps_timms_interface(family):
    model, size = build(family)
    subnet = random_subnet(model)
    merged = merge(subnet, size)
    x = torch.randn(2, *size)
    torch.testing.assert_close(
        merged.forward_features(x), subnet.model.forward_features(x), rtol=1e-3, atol=1e-4
    )
    features = merged.forward_intermediates(x, intermediates_only=True)
    for got, wanted in zip(
        features, subnet.model.forward_intermediates(x, intermediates_only=True), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    merged.reset_classifier(3)
    assert merged(x).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035", "convnext_atto"])
@torch.no_grad()
def test_features_only_models_merge(name):
    model = randomise_norms(timm.create_model(name, features_only=True).eval())
    subnet = random_subnet(model)
    merged = merge(subnet, (3, 64, 64))
    x = torch.randn(1, 3, 64, 64)
    for got, wanted in zip(merged(x), subnet(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_timms_reparameterize_model_merges_too():
    model, size = build("mobilenet")
    subnet = random_subnet(model)
    merged = timm.utils.reparameterize_model(subnet.model)
    x = torch.randn(2, *size)
    torch.testing.assert_close(merged(x), merge(subnet, size)(x), rtol=1e-4, atol=1e-5)


def test_the_input_is_left_alone():
    model, size = build("resnet")
    subnet = random_subnet(model)
    before = copy.deepcopy(subnet.state_dict())
    merged = merge(subnet, size)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    after = subnet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "bottleneck_d"])
def test_all_conv_and_norm_pairs_are_folded(family):
    model, size = build(family)
    subnet = random_subnet(model)
    pruned = sum(choice != "keep" for choice in subnet.choices().values())
    left = [m for m in merge(subnet, size).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == pruned  # the norm behind each merged block's non-linearity stays


def test_folding_leaves_shared_and_branching_convolutions_alone():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.twice, self.after = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y + self.after(self.twice(self.twice(x)))

    model = randomise_norms(Branching().eval())
    x = torch.randn(1, 3, 4, 4)
    before = model(x)
    assert fold_batch_norms(model) == 0
    assert torch.equal(model(x), before)


def test_structure_can_be_rebuilt_from_the_spec():
    model, size = build("mobilenet")
    subnet = random_subnet(model)
    merged = merge(subnet, size)
    rebuilt = merged_structure(subnet.spec())
    rebuilt.load_state_dict(merged.state_dict())
    x = torch.randn(2, *size)
    assert torch.equal(rebuilt(x), merged(x))


def test_refusals():
    model, size = build("resnet")
    subnet = random_subnet(model)
    with pytest.raises(MergeError, match="training mode"):
        merge(subnet.train(), size)
    subnet.eval().set_lambda(0.25)
    with pytest.raises(MergeError, match=r"lambda is not 0 in layer"):
        merge(subnet, size)
    with pytest.raises(MergeError, match="Supernet"):
        merge(model, size)
    with pytest.raises(MergeError, match="eval mode"):
        fold_batch_norms(copy.deepcopy(model).train())


def test_a_wrong_merge_is_caught(monkeypatch):
    from depthfuse.adapters.chain import ConvChain

    model, size = build("mobilenet")
    subnet = random_subnet(model)
    true_merge = ConvChain.merge

    def off_by_a_little(self, block):
        merged = true_merge(self, block)
        merged.conv.bias.data += 1e-6
        return merged

    monkeypatch.setattr(ConvChain, "merge", off_by_a_little)
    with pytest.raises(MergeError, match=r"merging changed the model by"):
        merge(subnet, size)
