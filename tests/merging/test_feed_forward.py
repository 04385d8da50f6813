"""Blocks that end in a feed-forward branch: Swin, Mixer, PoolFormer, CaiT and users' own, by what they compute."""

import pytest
import torch
import torch.nn.functional as F
from merged_twins import every_candidate_merges_exactly, the_path_begins_at_the_original
from nets import randomise_norms
from torch import nn

from depthfuse import Supernet, _torchvision, merge
from depthfuse.merging.adapters import find_blocks

BECOMES = {
    "ffn": "MergedFeedForward",
    "attention": "MergedMlpBlock",
    "linear": "MergedLinear",
    "idle": "MergedIdle",
    "no_act": "MergedIdle",
    "drop": "Dropped",
}
CONVOLUTIONS = BECOMES | {"linear": "MergedConv"}
ALL = ["ffn", "attention", "linear", "idle", "no_act", "drop"]


def timm_model(module, cls, **options):
    """A tiny model of a family, with a classifier that is not zero."""
    timm = pytest.importorskip("timm")
    model = getattr(getattr(timm.models, module), cls)(num_classes=5, **options)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight)
    return model


_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}
_METAFORMER = {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12)}
TIMM = {
    "swin": (lambda: timm_model("swin_transformer", "SwinTransformer", **_SWIN), 4, ALL, BECOMES),
    "swin v2": (lambda: timm_model("swin_transformer_v2", "SwinTransformerV2", **_SWIN), 4, ALL, BECOMES),
    "mixer": (
        lambda: timm_model("mlp_mixer", "MlpMixer", img_size=32, patch_size=8, embed_dim=12, num_blocks=2),
        2, ALL, BECOMES,
    ),
    "resmlp": (
        lambda: timm_model("mlp_mixer", "MlpMixer", img_size=32, patch_size=8, embed_dim=12, num_blocks=2, mlp_ratio=2,
                           block_layer=pytest.importorskip("timm").models.mlp_mixer.ResBlock),
        2, ALL, BECOMES,
    ),
    "cait": (
        lambda: timm_model("cait", "Cait", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2,
                           depth_token_only=1, init_values=0.5),
        3, ALL, BECOMES,
    ),
    "poolformer": (
        lambda: timm_model("metaformer", "MetaFormer", **_METAFORMER, downsample_norm=None,
                           token_mixers=pytest.importorskip("timm").models.metaformer.Pooling,
                           mlp_act=nn.GELU, norm_layers=pytest.importorskip("timm").layers.GroupNorm1,
                           layer_scale_init_values=0.5, res_scale_init_values=None, use_mlp_head=False),
        4, ALL, CONVOLUTIONS,
    ),
    "inception next": (
        lambda: timm_model("inception_next", "MetaNeXt", depths=(1, 1, 1, 1), dims=(16, 16, 16, 16), ls_init_value=0.5),
        4, ["ffn", "idle", "no_act", "drop"], CONVOLUTIONS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_every_candidate_merges_exactly(name):
    torch.manual_seed(0)
    make, blocks, candidates, becomes = TIMM[name]
    model = randomise_norms(make()).eval()
    assert list(dict.fromkeys(n for names in Supernet(model).options().values() for n in names)) == candidates
    every_candidate_merges_exactly(model, blocks, (3, 32, 32), becomes)


@pytest.mark.parametrize("name", TIMM)
def test_the_path_from_the_original_is_continuous(name):
    torch.manual_seed(0)
    the_path_begins_at_the_original(randomise_norms(TIMM[name][0]()).eval(), (3, 32, 32))


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_every_candidate_of_torchvision_merges_exactly(name):
    _torchvision.ensure()
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = randomise_norms(models.get_model(name, weights=None, num_classes=5)).eval()
    every_candidate_merges_exactly(model, 12, (3, 64, 64), BECOMES)


_WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
_SWIN_OF_HUGGING_FACE = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_TUPLES = BECOMES | dict.fromkeys(("attention", "linear", "drop"), "WithNones")
HUGGING_FACE = {
    "Swin": (_SWIN_OF_HUGGING_FACE, 4, _TUPLES),
    "Dinov2": ({**_WIDTH, "patch_size": 8}, 2, BECOMES),
    "PoolFormer": ({"hidden_sizes": [8, 8, 12, 12], "depths": [1, 1, 1, 1]}, 4, _TUPLES),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_every_candidate_of_hugging_face_merges_exactly(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    options, blocks, becomes = HUGGING_FACE[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(image_size=32, num_labels=5, **options)
    model = randomise_norms(getattr(transformers, f"{name}ForImageClassification")(config)).eval()
    every_candidate_merges_exactly(model, blocks, (3, 32, 32), becomes)


class PreNorm(nn.Module):
    """A feed-forward branch as many write it."""

    def __init__(self, width, act):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.net = nn.Sequential(
            nn.Linear(width, 2 * width), act, nn.Dropout(0.1), nn.Linear(2 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x):
        return x + self.net(self.norm(x))


class Mixing(nn.Module):
    """Tokens mixed in some way, then the feed-forward branch; `compute` is the block."""

    def __init__(self, compute=None):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(12) for _ in range(3))
        self.mixer = nn.Linear(16, 16)
        self.fc1, self.act, self.fc2, self.gate = (
            nn.Linear(12, 20),
            nn.SiLU(),
            nn.Linear(20, 12),
            nn.Linear(12, 12),
        )
        self.prelu, self.gamma = nn.PReLU(), nn.Parameter(torch.rand(12))
        self.compute = compute or (lambda m, x: x + m.fc2(m.act(m.fc1(m.norm2(x)))))

    def forward(self, x):
        return self.compute(self, x + self.mixer(self.norm1(x).transpose(1, 2)).transpose(1, 2))


class Tokens(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 12, 8, 8), nn.Sequential(*blocks), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def options_of(*blocks):
    torch.manual_seed(0)
    model = randomise_norms(Tokens(*blocks)).eval()
    return model, {info.path: info for info in find_blocks(model)}


def test_a_branch_alone_and_a_mixer_of_ones_own():
    model, infos = options_of(PreNorm(12, nn.ReLU(inplace=True)), Mixing())
    assert [c.name for c in infos["blocks.0"].candidates] == ["ffn", "idle", "no_act", "drop"]
    assert "nothing comes before" in infos["blocks.0"].reason
    assert [c.name for c in infos["blocks.1"].candidates] == ALL
    every_candidate_merges_exactly(model, 2, (3, 32, 32), BECOMES)


ALIKE = {
    "post norm": lambda m, x: x + m.norm3(m.fc2(m.act(m.fc1(x)))),
    "a scale": lambda m, x: x + m.gamma * m.fc2(m.act(m.fc1(m.norm2(x)))),
    "a scale after the norm": lambda m, x: m.norm3(m.fc2(m.act(m.fc1(m.norm2(x))))) * m.gamma + x,
    "the skip last": lambda m, x: m.fc2(m.act(m.fc1(m.norm2(x)))) + x,
}


@pytest.mark.parametrize("name", ALIKE)
def test_forms_of_the_branch(name):
    model, infos = options_of(Mixing(ALIKE[name]))
    assert [c.name for c in infos["blocks.0"].candidates] == ALL
    every_candidate_merges_exactly(model, 1, (3, 32, 32), BECOMES)
    the_path_begins_at_the_original(model, (3, 32, 32))


def two_readers(m, x):
    h = m.fc1(m.norm2(x))
    return x + h.mean() + m.fc2(m.act(h))


REFUSED = {
    "a gate": (lambda m, x: x + m.gate(x).sigmoid() * m.fc2(m.act(m.fc1(m.norm2(x)))), "a gate"),
    "a function": (lambda m, x: x + m.fc2(F.gelu(m.fc1(m.norm2(x)))), "called as a function"),
    "weights in the activation": (lambda m, x: x + m.fc2(m.prelu(m.fc1(m.norm2(x)))), "PReLU prelu"),
    "a factor": (lambda m, x: x + 0.5 * m.fc2(m.act(m.fc1(m.norm2(x)))), "unknown"),
    "two readers": (two_readers, "two readers"),
    "called twice": (lambda m, x: x + m.fc2(m.act(m.fc1(m.norm2(x + m.fc2(m.act(m.fc1(x))))))), "called twice"),
    "no skip": (lambda m, x: m.fc2(m.act(m.fc1(m.norm2(x)))), "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_stands_in_the_way_is_named(name):
    compute, reason = REFUSED[name]
    model, infos = options_of(Mixing(compute), Mixing())
    assert not infos["blocks.0"].candidates and infos["blocks.1"].candidates
    assert reason in infos["blocks.0"].reason
    supernet = Supernet(model).eval()
    supernet.set_choices({"blocks.1": "ffn"})
    assert merge(supernet, (3, 32, 32)).merge_report.output < 1e-10


def test_without_a_skip_around_the_mixer_only_the_branch_can_go():
    model, infos = options_of(Mixing(lambda m, x: (lambda h: h + m.fc2(m.act(m.fc1(m.norm2(h)))))(m.gate(x))))
    assert [c.name for c in infos["blocks.0"].candidates] == ["ffn", "idle", "no_act"]
    assert "no skip" in infos["blocks.0"].reason
    every_candidate_merges_exactly(model, 1, (3, 32, 32), BECOMES)


@pytest.mark.parametrize("candidate", ALL)
def test_pruned_blocks_train(candidate):
    model, _ = options_of(Mixing(), PreNorm(12, nn.GELU()))
    supernet = Supernet(model).train()
    chosen = {path: candidate for path, names in supernet.options().items() if candidate in names}
    supernet.set_choices(chosen, 0.5)
    supernet(torch.randn(4, 3, 32, 32)).square().mean().backward()
    for path in chosen:
        switch = supernet.blocks[path]
        assert all(p.grad is not None for p in switch.candidates[candidate].parameters())
        assert all("forward" not in vars(m) for m in switch.block.modules())


def test_layers_are_themselves_again_after_an_error():
    model, _ = options_of(Mixing())
    supernet = Supernet(model).eval()
    supernet.set_choices({"blocks.0": "ffn"})
    with pytest.raises(RuntimeError):
        supernet(torch.randn(1, 3, 32, 40))  # the mixer takes 16 tokens
    supernet.set_choices({})
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(supernet(x), model(x))
