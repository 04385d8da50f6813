"""Blocks that are found by what they compute: in torchvision, in Hugging Face's models, and as users write them."""

import copy
import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from merged_twins import every_candidate_merges_exactly, the_path_begins_at_the_original
from nets import randomise_norms
from on_request import on_request
from torch import nn

from depthfuse import Supernet, _torchvision, merge
from depthfuse.errors import SpecError
from depthfuse.merging.adapters import find_blocks
from depthfuse.merging.adapters.base import known_candidates
from depthfuse.merging.adapters.reading import structure_of
from depthfuse.merging.adapters.structure import Unread

SIZE = (3, 32, 32)


class OptionA(nn.Module):
    """The CIFAR ResNet's shortcut without weights, as most people write it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class CifarBlock(nn.Module):
    def __init__(self, width, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or width != planes:
            self.shortcut = OptionA(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.width = 16
        self.layer1, self.layer2, self.layer3 = (
            self.stage(planes, depth // 6, stride) for planes, stride in ((16, 1), (32, 2), (64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def stage(self, planes, count, stride):
        blocks = []
        for i in range(count):
            blocks.append(CifarBlock(self.width, planes, stride if i == 0 else 1))
            self.width = planes
        return nn.Sequential(*blocks)

    def forward(self, x):
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(out, out.size()[3]).view(out.size(0), -1))


class PreActivation(nn.Module):
    """He et al. 2016 (identity mappings): the shortcut with a convolution reads what the first norm gives."""

    def __init__(self, width, planes, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width, planes, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + skip


class FiveLines(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        return x + self.b(F.gelu(self.a(x)))


def separable(width, out, stride):
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
    )  # fmt: skip


@torch.no_grad()
def around(*blocks):
    """A net of some blocks between 8 channels and a classifier of the last one's."""
    body = nn.Sequential(*blocks)
    channels = body(torch.zeros(2, 8, 8, 8)).shape[1]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), body, *head)


OWN = {
    "resnet20": (lambda: CifarResNet(20), 9),
    "resnet56": (lambda: CifarResNet(56), 27),
    "pre-activation": (
        lambda: around(PreActivation(8, 8, 1), PreActivation(8, 12, 2), PreActivation(12, 12, 1)),
        3,
    ),
    "five lines": (lambda: around(FiveLines(8), FiveLines(8)), 2),
    "mobilenet v1": (lambda: around(separable(8, 12, 1), separable(12, 16, 2), separable(16, 16, 1)), 3),
}
TORCHVISION = {
    "resnet18": 8,
    "resnet50": 16,
    "resnext50_32x4d": 16,
    "mobilenet_v2": 17,
    "mnasnet0_5": 16,
    "regnet_x_400mf": 22,
    "shufflenet_v2_x0_5": 16,
    "convnext_tiny": 18,
    "vit_b_32": 12,
}


def model_of(name):
    torch.manual_seed(0)
    if name in OWN:
        make, blocks = OWN[name]
        return randomise_norms(make()).eval(), blocks
    _torchvision.ensure()
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return randomise_norms(models.get_model(name, weights=None)).eval(), TORCHVISION[name]


_VIT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "patch_size": 8,
}
_NARROW = {"hidden_sizes": [8, 16], "embedding_size": 8}
HUGGING_FACE = {
    "ViT": (_VIT, 2),
    "DeiT": (_VIT, 2),
    "ConvNext": ({"hidden_sizes": [8, 12], "depths": [2, 1], "num_stages": 2}, 3),
    "ResNet": ({**_NARROW, "depths": [2, 2], "layer_type": "basic"}, 4),
    "MobileNetV2": ({"depth_multiplier": 0.35, "tf_padding": False}, 17),
    "RegNet": ({**_NARROW, "depths": [1, 2], "layer_type": "x", "groups_width": 4}, 3),
}


def hugging_face(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    options, blocks = HUGGING_FACE[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(image_size=32, num_labels=5, **options)
    return randomise_norms(getattr(transformers, f"{name}ForImageClassification")(config)).eval(), blocks


BECOMES = {
    "factorised": "MergedFactorised",
    "drop": "Dropped",
    "ffn": "MergedTransformerBlock",
    "attention": "MergedMlpBlock",
    "linear": "MergedLinear",
    "idle": "MergedIdle",
    "no_act": "MergedIdle",
}


# Their kinds are tested on smaller nets, too: RegNet has groups, Hugging Face's ViT the same blocks.
LARGE = ("resnext50_32x4d", "vit_b_32")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=on_request("half a minute") if name in LARGE else ())
        for name in (*OWN, *TORCHVISION)
    ],
)
def test_every_candidate_merges_exactly(name):
    """`merge` compares each block, border and interior, and the output in float64."""
    model, blocks = model_of(name)
    every_candidate_merges_exactly(model, blocks, (3, 224, 224) if name.startswith("vit") else SIZE, BECOMES)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_candidate_of_hugging_face_merges_exactly(name):
    every_candidate_merges_exactly(*hugging_face(name), SIZE, BECOMES)


@pytest.mark.parametrize("name", OWN)
def test_the_path_from_the_original_is_continuous(name):
    """At lambda = 1 the block itself, and close to it just before: what is mixed is the same block."""
    the_path_begins_at_the_original(model_of(name)[0], SIZE, tolerance=1e-4)


def test_a_pruned_block_trains():
    model, _ = model_of("pre-activation")
    supernet = Supernet(model)
    supernet.set_choices({path: names[0] for path, names in supernet.options().items()}, 0.5)
    supernet.train()
    supernet(torch.randn(4, *SIZE)).square().mean().backward()
    for block in supernet.blocks.values():
        assert all(p.grad is not None for p in block.candidates[block.choice].parameters())


class Variant(nn.Module):
    """Almost a residual block; `compute` says what is different."""

    def __init__(self, compute):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc, self.group_norm = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
        self.compute, self.seen = compute, None

    def forward(self, x):
        return self.compute(self, x)


def keeps(m, x):
    m.seen = m.bn1(m.conv1(x))
    return x + m.bn2(m.conv2(m.seen.relu()))


def reads_twice(m, x):
    h = m.bn1(m.conv1(x))
    return x + m.bn2(m.conv2(h.relu())) * 1 + 0 * h


VARIANTS = {
    "a gate": (lambda m, x: x + m.bn2(m.conv2(m.conv1(x).relu())) * m.fc(x.mean((2, 3), True)).sigmoid(), "a gate"),
    "a hidden reader": (keeps, "keeps a value"),
    "called twice": (lambda m, x: x + m.bn2(m.conv1(m.bn1(m.conv1(x)).relu())), "called twice"),
    "another norm": (lambda m, x: x + m.conv2(m.group_norm(m.conv1(x)).relu()), "GroupNorm"),
    "nothing to remove": (lambda m, x: x + m.bn2(m.conv2(m.bn1(m.conv1(x)))), "linear already"),
    "activation before the skip": (lambda m, x: x + m.bn2(m.conv2(m.bn1(m.conv1(x)).relu())).relu(), "and the skip"),
    "softmax": (lambda m, x: x + m.conv2(m.conv1(x).softmax(1)), "softmax"),
    "norm after activation": (lambda m, x: x + m.conv2(m.bn1(m.conv1(x).relu())), "a norm between"),
    "other weights on the branches": (lambda m, x: torch.add(x, m.conv2(m.conv1(x).relu()), alpha=2), "no skip"),
    "an input that is written over": (lambda m, x: m.bn2(m.conv2(m.conv1(x.relu_()).relu())) + x, "writes over"),
    "a factor": (lambda m, x: x + 0.1 * m.conv2(m.conv1(x).relu()), "mul"),
    "a pool": (lambda m, x: x + m.conv2(F.max_pool2d(m.conv1(x).relu(), 3, 1, 1)), "max_pool2d"),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_in_the_way_is_named(name):
    compute, reason = VARIANTS[name]
    model = around(Variant(compute), FiveLines(8)).eval()
    infos = {info.path: info for info in find_blocks(model)}
    assert infos["1.1"].candidates
    assert not infos["1.0"].candidates
    assert reason in infos["1.0"].reason
    supernet = Supernet(model).eval()
    supernet.set_choices({"1.1": "dense"})
    assert merge(supernet, SIZE).merge_report.output < 1e-10


@pytest.mark.parametrize(
    "compute",
    [
        reads_twice,
        lambda m, x: (x + m.conv2(m.conv1(x).relu()), x)[0] if x.sum() > 0 else x,
        lambda m, x: x + m.conv2(m.conv1(x).relu()) + m.fc(x),
    ],
    ids=["two readers", "branches on values", "three branches"],
)
def test_what_is_no_single_branch_is_none(compute):
    model = around(Variant(compute), FiveLines(8)).eval()
    infos = {info.path: info for info in find_blocks(model)}
    assert not infos["1.0"].candidates


class GivenSkip(FiveLines):
    """As in DLA: the caller may hand over what is added."""

    def forward(self, x, skip=None):
        return super().forward(x) if skip is None else skip + self.b(F.gelu(self.a(x)))


def test_a_block_that_may_be_given_its_skip_is_left_alone():
    infos = {info.path: info for info in find_blocks(around(GivenSkip(8), FiveLines(8)).eval())}
    assert "more than one input (skip)" in infos["1.0"].reason and not infos["1.0"].candidates
    assert infos["1.1"].candidates


def test_what_was_read_keeps_no_model_alive():
    """Neither a block that was found, nor one whose obstacle was."""
    model = around(Variant(VARIANTS["a gate"][0]), FiveLines(8)).eval()
    blocks = [weakref.ref(block) for block in model[1]]
    assert len(find_blocks(model)) == 2
    for _ in range(2):  # the second time the reason is the one that is remembered
        with pytest.raises(Unread, match="a gate"):
            structure_of(model[1][0])
    del model
    gc.collect()
    assert all(block() is None for block in blocks)


def test_a_block_is_read_anew():
    model = around(FiveLines(8), FiveLines(8)).eval()
    assert all(info.candidates for info in find_blocks(model))
    model[1][0].b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Softmax(1))
    infos = {info.path: info for info in find_blocks(model)}
    assert "Softmax" in infos["1.0"].reason and infos["1.1"].candidates


def test_a_block_with_a_hook_is_left_alone():
    model = around(FiveLines(8), FiveLines(8)).eval()
    model[1][0].a.register_forward_hook(lambda *_: None)
    infos = {info.path: info for info in find_blocks(model)}
    assert "forward hook" in infos["1.0"].reason and infos["1.1"].candidates


def test_a_model_is_left_as_it_was():
    model = around(CifarBlock(8, 16, 2), CifarBlock(16, 16, 1)).train()
    state = copy.deepcopy(model.state_dict())
    find_blocks(model)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto", "vit_tiny_patch16_224"])
def test_families_are_known_by_class_first(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    infos = find_blocks(model)
    assert infos
    for info in infos:
        known = known_candidates(type(model.get_submodule(info.path)))
        assert info.candidates and set(info.candidates) <= set(known)


def test_a_layer_of_a_known_block_that_is_no_convolution():
    timm = pytest.importorskip("timm")
    infos = find_blocks(timm.create_model("mixnet_s"))
    mixed = [info for info in infos if "MixedConv2d" in info.reason]
    assert mixed and not any(info.candidates for info in mixed)


def random_block(rng):
    """A block by a grammar, and whether it can be pruned."""
    width, stride = rng.choice([4, 6, 8]), rng.choice([1, 1, 2])
    layers, channels, acts = [], 8, 0
    count = rng.randint(2, 4)
    for i in range(count):
        last = i == count - 1
        out = 8 if last else width
        kernel = rng.choice([1, 3, 3, 5])
        groups = rng.choice([1, 2, out if channels == out else 1])
        layers.append(
            nn.Conv2d(
                channels,
                out,
                kernel,
                stride if i == 0 else 1,
                kernel // 2,
                groups=groups,
                bias=rng.random() < 0.5,
            )
        )
        if last or rng.random() < 0.8:
            layers.append(nn.BatchNorm2d(out))
        if not last and rng.random() < 0.8:
            layers.append(rng.choice([nn.ReLU(), nn.GELU(), nn.SiLU(), nn.LeakyReLU(0.2), nn.Hardswish()]))
            acts += 1
        channels = out
    branch = nn.Sequential(*layers)
    skip = rng.choice(["none", "identity", "conv", "pool"])
    if stride == 1 and skip == "pool":
        skip = "identity"
    if stride == 2 and skip == "identity":
        skip = "conv"

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = branch
            self.side = {
                "none": None,
                "identity": nn.Identity(),
                "conv": nn.Sequential(nn.Conv2d(8, 8, 1, stride), nn.BatchNorm2d(8)),
                "pool": nn.Sequential(nn.AvgPool2d(stride, stride), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
            }[skip]
            self.act = rng.choice([nn.ReLU(), nn.Identity()])

        def forward(self, x):
            y = self.branch(x)
            return self.act(y if self.side is None else y + self.side(x))

    return Block(), acts > 0


def test_random_blocks_merge_exactly_or_say_why():
    rng = random.Random(0)
    merged_blocks = 0
    for seed in range(60):
        torch.manual_seed(seed)
        block, has_activation = random_block(rng)
        model = randomise_norms(around(block, FiveLines(8))).eval()
        infos = {info.path: info for info in find_blocks(model)}
        if not has_activation:
            with pytest.raises(Unread, match="linear already"):
                structure_of(block)
            continue
        (found,) = (info for path, info in infos.items() if path.startswith("1.0"))
        if not found.candidates:
            assert "has no place for them" in found.reason
            continue
        supernet = Supernet(model).eval()
        for candidate in supernet.options()[found.path]:
            supernet.set_choices({found.path: candidate})
            randomise_norms(supernet)
            assert merge(supernet, SIZE).merge_report.output < 1e-10
            merged_blocks += 1
    assert merged_blocks > 60


def test_a_model_without_blocks_says_so():
    with pytest.raises(SpecError, match="no block"):
        Supernet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2)))
