"""Merging must change nothing: exact in float64, the same answers in float32, at full size and on odd maps."""

import copy
import random

import pytest
import timm
import torch
from nets import SMALL, build, each_candidate, random_subnet, randomise_norms
from on_request import LONG
from timm.layers import BatchNormAct2d
from timm.layers.attention import Attention
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from depthfuse import ModelSource, Supernet, merge
from depthfuse.costs.inspection import inspect_model
from depthfuse.errors import MergeError
from depthfuse.measuring.counting import count_macs, count_parameters
from depthfuse.merging.folding import fold_batch_norms
from depthfuse.merging.merge import merged_structure
from depthfuse.merging.merged_blocks import TokenBatchNorm
from depthfuse.merging.supernet import SwitchBlock

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
            assert not any(isinstance(m, SwitchBlock) for m in merged.get_submodule(name).modules())


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_every_block_alone_with_every_candidate(family):
    """Per block, so that a deep net cannot hide an error; borders are compared like the interior."""
    model, size = build(family)
    supernet = randomise_norms(Supernet(model)).eval().double()
    images = torch.randn(2, *size, dtype=torch.float64)
    for path, name, block, seen in each_candidate(supernet, images):
        merged = block.fuse()
        inputs = [seen]
        if seen.ndim == 4:  # maps down to one pixel: the border is then everything
            inputs += [torch.randn(*seen.shape[:2], n, n + 1, dtype=torch.float64) for n in (1, 2, 5)]
        for x in inputs:
            assert relative_error(merged(x), block(x)) <= 1e-12, (path, name, x.shape)


@torch.no_grad()
def test_what_the_candidates_become():
    """One small kernel where that is what they promise, strides kept, and nothing at all of a dropped block."""
    shapes = {
        ("resnet", "identity"): (3, 3),
        ("resnet", "compact"): (3, 3),
        ("bottleneck_d", "compact"): (1, 1),
        ("mobilenet", "compact"): (1, 1),
        ("edge", "compact"): (1, 1),
        ("convnext", "compact"): (1, 1),
    }
    for (family, candidate), kernel in shapes.items():
        supernet = Supernet(build(family)[0]).eval()
        blocks = [block for block in supernet.blocks.values() if candidate in block.candidates]
        assert len(blocks) > 1
        for block in blocks:
            block.choice = candidate
            assert block.fuse().conv.kernel_size == kernel
    supernet = Supernet(build("vit")[0]).eval()
    for name in ("attention", "linear"):
        supernet.set_choices({"blocks.1": name})
        assert not any(isinstance(m, Attention) for m in supernet.blocks["blocks.1"].fuse().modules())
    supernet.set_choices({"blocks.1": "drop"})
    assert not supernet.blocks["blocks.1"].fuse().state_dict()


@torch.no_grad()
def test_attention_masks_reach_only_those_who_attend():
    model, _ = build("vit")
    supernet = randomise_norms(Supernet(model)).eval().double()
    x, mask = torch.randn(2, 10, 24, dtype=torch.float64), torch.rand(10, 10) > 0.5
    mask.fill_diagonal_(True)
    block = supernet.blocks["blocks.1"]
    for name in block.candidates:
        supernet.set_choices({"blocks.1": name})
        wanted = block(x, attn_mask=mask, is_causal=False)
        assert relative_error(block.fuse()(x, attn_mask=mask, is_causal=False), wanted) <= 1e-12, name
        assert torch.equal(wanted, block(x)) == (name not in ("ffn", "idle", "no_act"))


@pytest.mark.parametrize("name", FULL_SIZE)
@torch.no_grad()
def test_full_size_nets(name):
    """The nets of the paper at 224 px: bit-equal baseline, 1e-10 in float64, the same classes in float32."""
    torch.manual_seed(0)
    model = randomise_norms(ModelSource.make(name).build().eval())
    supernet = Supernet(model).eval()
    x = torch.randn(256 if LONG else 16, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    assert torch.equal(supernet(x[:4]), model(x[:4]))
    randomise_norms(supernet)
    supernet.set_choices(supernet.sample(random.Random(3)))
    merged = merge(supernet)  # compares in float64 at 224 px
    report = merged.merge_report
    assert max(report.output, *(max(b.border, b.interior) for b in report.blocks)) <= 1e-10
    for batch in x.split(16):
        assert torch.equal(merged(batch).argmax(-1), supernet(batch).argmax(-1))


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "convnext", "vit"])
@torch.no_grad()
def test_merged_model_keeps_timms_interface(family):
    model, size = build(family)
    subnet = random_subnet(model)
    if family == "vit":  # in a run of linear blocks norms move on: between them other values pass
        subnet.set_choices({"blocks.0": "ffn", "blocks.1": "attention", "blocks.2": "linear"})
    subnet.double()
    merged = merge(subnet, size)
    x = torch.randn(2, *size, dtype=torch.float64)
    assert relative_error(merged.forward_features(x), subnet.model.forward_features(x)) <= 1e-10
    features = merged.forward_intermediates(x, intermediates_only=True)
    for got, wanted in zip(
        features, subnet.model.forward_intermediates(x, intermediates_only=True), strict=True
    ):
        assert relative_error(got, wanted) <= 1e-10
    merged.reset_classifier(3)
    assert merged.double()(x).shape == (2, 3)  # older timm makes a classifier of its own dtype


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035", "convnext_atto"])
@torch.no_grad()
def test_features_only_models_merge(name):
    model = randomise_norms(timm.create_model(name, features_only=True).eval())
    subnet = random_subnet(model)
    subnet.double()
    merged = merge(subnet, (3, 64, 64))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for got, wanted in zip(merged(x), subnet(x), strict=True):
        assert relative_error(got, wanted) <= 1e-10


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
    pruned = {path for path, choice in subnet.choices().items() if choice != "keep"}
    left = {n for n, m in merge(subnet, size).named_modules() if isinstance(m, nn.BatchNorm2d)}
    # only the norm behind a merged block's non-linearity may stay
    assert left and left <= {f"{path}.norm" for path in pruned}


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


@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (nn.BatchNorm2d(6), nn.Conv2d(6, 9, 1), (6, 5, 4)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 9, 1, bias=False), (6, 5, 4)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, stride=2, groups=2), (6, 7, 8)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 12, (2, 3), dilation=2, groups=6, padding="valid"), (6, 7, 8)),
        (TokenBatchNorm(6), nn.Linear(6, 9), (5, 6)),
        (TokenBatchNorm(6), nn.Linear(6, 9, bias=False), (6,)),
    ],
)
@torch.no_grad()
def test_norms_fold_into_the_layer_behind_them(norm, layer, shape):
    model = randomise_norms(nn.Sequential(nn.GELU(), norm, nn.Identity(), layer)).eval().double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    before = model(x)
    assert fold_batch_norms(model) == 1
    assert type(model[1]) is nn.Identity
    assert relative_error(model(x), before) <= 1e-14


@pytest.mark.parametrize(
    ("norm", "layer"),
    [
        (nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)),
        (nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding="same")),
        (nn.BatchNorm2d(6), Conv2dSame(6, 6, 3)),
        (nn.BatchNorm2d(6), nn.Linear(6, 6)),  # over another axis
        (nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(6, 6, 1)),
        (BatchNormAct2d(6), nn.Conv2d(6, 6, 1)),
    ],
)
@torch.no_grad()
def test_norms_stay_where_the_layer_behind_cannot_take_them(norm, layer):
    model = nn.Sequential(nn.GELU(), norm, layer).eval()
    x = torch.randn(2, 6, 6, 6)
    before = model(x)
    assert fold_batch_norms(model) == 0
    assert model[1] is norm and torch.equal(model(x), before)


RUNS = [  # family, choices, the norms that go
    ("vit", {"blocks.0": "linear", "blocks.1": "linear", "blocks.2": "linear"}, ["blocks.0", "blocks.1"]),
    ("vit", {"blocks.0": "ffn", "blocks.1": "drop", "blocks.2": "linear"}, ["blocks.0"]),
    ("vit", {"blocks.0": "linear", "blocks.1": "attention", "blocks.2": "ffn"}, []),
    ("convnext", {"stages.2.blocks.0": "factorised", "stages.2.blocks.1": "compact"}, ["stages.2.blocks.0"]),
    ("convnext", {"stages.2.blocks.0": "compact", "stages.2.blocks.1": "dense"}, []),
    ("bottleneck_d", {"layer2.0": "dense", "layer2.1": "compact"}, ["layer2.0"]),
    ("mobilenet", {"blocks.2.0": "dense", "blocks.2.1": "compact", "blocks.2.2": "drop"}, ["blocks.2.0"]),
    ("mobilenet", {"blocks.1.1": "dense"}, []),  # the end of a stage: a feature that others read
]


@pytest.mark.parametrize(("family", "choices", "gone"), RUNS)
@torch.no_grad()
def test_norms_between_merged_blocks(family, choices, gone):
    model, size = build(family)
    subnet = randomise_norms(Supernet(model)).eval().double()
    subnet.set_choices(choices)
    merged = merge(subnet, size)  # exact in float64, or it raises
    norms = {
        p: merged.get_submodule(p).norm for p, name in choices.items() if name not in ("attention", "drop")
    }
    assert [path for path, norm in norms.items() if isinstance(norm, nn.Identity)] == gone
    x = torch.randn(2, *size, dtype=torch.float64)
    assert relative_error(merged(x), subnet(x)) <= 1e-10
    rebuilt = merged_structure(subnet.spec()).double()
    rebuilt.load_state_dict(merged.state_dict())
    assert torch.equal(rebuilt(x), merged(x))


def test_structure_can_be_rebuilt_from_the_spec():
    model, size = build("mobilenet")
    subnet = random_subnet(model)
    merged = merge(subnet, size)
    rebuilt = merged_structure(subnet.spec())
    rebuilt.load_state_dict(merged.state_dict())
    x = torch.randn(2, *size)
    assert torch.equal(rebuilt(x), merged(x))


@torch.no_grad()
def test_a_block_merged_to_nothing_counts_nothing():
    model, size = build("resnet")
    supernet = Supernet(model).eval()
    supernet.set_choices({"layer1.1": "drop"})
    form = supernet.blocks["layer1.1"].fuse()
    assert (count_macs(form, (8, 12, 12)), count_parameters(form)) == (0, 0)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=size)
    rows, _ = inspect_model(model)
    dropped = [row for row in rows if row.candidate == "drop"]
    assert dropped and all(r.macs_after == r.parameters_after == 0 < r.macs_before for r in dropped)


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
    from depthfuse.merging.adapters.chain import ConvChain

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
