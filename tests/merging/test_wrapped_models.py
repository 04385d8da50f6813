"""timm models inside others: features of a ViT of another image size, Hugging Face's TimmWrapper, one's own."""

from collections import OrderedDict
from dataclasses import dataclass, fields

import pytest
import timm
import torch
from nets import build, random_subnet, randomise_branches, randomise_norms
from torch import nn

from depthfuse import ModelSource, Supernet, merge
from depthfuse.errors import MergeError
from depthfuse.merging.model_inputs import input_size, known_input_size
from depthfuse.merging.outputs import tensors_of


@dataclass
class ImageClassifierOutput(OrderedDict):
    """As transformers' ModelOutput: a dataclass whose fields that are set are items too."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple | None = None

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Config:
    def __init__(self):
        self.num_labels, self.use_return_dict, self.output_hidden_states = 7, True, False


class TimmWrapperForImageClassification(nn.Module):
    """The structure and the calls of the class of that name in transformers."""

    def __init__(self, timm_model):
        super().__init__()
        self.config, self.num_labels = Config(), 7
        self.timm_model = timm_model

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def forward(self, pixel_values, labels=None, output_hidden_states=None, return_dict=None, **kwargs):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        pixel_values = pixel_values.to(self.dtype)
        hidden_states = None
        if wanted:
            last, hidden_states = self.timm_model.forward_intermediates(pixel_values)
            logits = self.timm_model.forward_head(last)
        else:
            logits = self.timm_model(pixel_values, **kwargs)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)


def relative_error(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "convnext", "vit"])
@pytest.mark.parametrize("hidden", [False, True])
@torch.no_grad()
def test_timm_wrapper_merges(family, hidden):
    timm_model, size = build(family)
    model = TimmWrapperForImageClassification(timm_model).eval()
    model.config.output_hidden_states = hidden
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subnet = random_subnet(model, everything=True).double()
    assert all(path.startswith("timm_model.") for path in subnet.options())
    merged = merge(subnet, size)
    assert type(merged) is TimmWrapperForImageClassification and type(merged.timm_model) is type(timm_model)
    x = torch.randn(3, *size, dtype=torch.float64)
    labels = torch.tensor([1, 0, 3])
    for kwargs in ({}, {"labels": labels}, {"return_dict": False}, {"output_hidden_states": not hidden}):
        got = tensors_of(merged(pixel_values=x, **kwargs))
        wanted = tensors_of(subnet.model(pixel_values=x, **kwargs))
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert relative_error(got[name], tensor) <= 1e-10, (name, kwargs)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def test_norms_fold_inside_a_wrapper_too():
    timm_model, size = build("resnet")
    alone, inside = (
        random_subnet(timm_model),
        random_subnet(TimmWrapperForImageClassification(timm_model).eval()),
    )
    alone.set_choices({"layer1.0": "compact"})
    inside.set_choices({"timm_model.layer1.0": "compact"})
    folded = [merge(subnet, size).merge_report.folded_norms for subnet in (alone, inside)]
    assert folded[0] == folded[1] > 0


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@torch.no_grad()
def test_features_of_a_vit_of_another_image_size(size):
    model = timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        img_size=size,
        depth=4,
        out_indices=(1, 2),
        embed_dim=24,
        num_heads=3,
    )
    model = randomise_norms(randomise_branches(model)).eval()
    assert input_size(model) == (3, *size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in range(3):
        subnet = random_subnet(model, seed, everything=True).double()
        merged = merge(subnet)  # at the size that it is bound to
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        for got, wanted in zip(merged(x), subnet(x), strict=True):
            assert relative_error(got, wanted) <= 1e-10
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_row_of_linear_blocks_whose_features_are_asked_for_keeps_their_norms():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        img_size=32,
        depth=4,
        out_indices=(0, 2),
        embed_dim=24,
        num_heads=3,
    )
    subnet = random_subnet(randomise_branches(model).eval()).double()
    paths = list(subnet.options())
    subnet.set_choices(dict.fromkeys(paths, "linear"))
    merged = merge(subnet)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for got, wanted in zip(merged(x), subnet(x), strict=True):
        assert relative_error(got, wanted) <= 1e-10
    norms = [type(merged.get_submodule(path).norm) is nn.Identity for path in paths]
    assert norms[:3] == [False, True, False]  # what lies between two features is nobody's


@torch.no_grad()
def test_a_size_that_the_model_does_not_take_is_refused_by_name():
    subnet = random_subnet(build("vit")[0])
    kept = {name: value.clone() for name, value in subnet.state_dict().items()}
    with pytest.raises(MergeError, match=r"does not take float64 images \[2, 3, 32, 40\].*pass check_size"):
        merge(subnet, (3, 32, 40))
    assert all(torch.equal(kept[name], value) for name, value in subnet.state_dict().items())


def test_input_sizes_are_found_inside():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), in_chans=5, depth=1)
    assert known_input_size(vit) == known_input_size(nn.Sequential(nn.Identity(), vit)) == (5, 32, 48)
    assert known_input_size(TimmWrapperForImageClassification(timm.create_model("resnet18"))) == (3, 224, 224)
    assert known_input_size(nn.Sequential(nn.Conv2d(1, 1, 1))) is None
    own = timm.models.vision_transformer.VisionTransformer(img_size=32, embed_dim=24, num_heads=3, depth=1)
    assert input_size(own) == (3, 32, 32)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet18"])
@torch.no_grad()
def test_features_by_hooks_merge_where_no_hook_looks(name):
    """timm watches layers inside blocks; what it sees there must stay."""
    kwargs = {"feature_cls": "hook"} if name == "resnet18" else {"feature_location": "expansion"}
    try:
        model = timm.create_model(name, features_only=True, **kwargs)
    except (TypeError, RuntimeError, AssertionError) as error:
        pytest.skip(f"this timm has no features by hooks for {name}: {error}")
    subnet = random_subnet(randomise_norms(model.eval()), everything=True).double()
    merged = merge(subnet, (3, 65, 64))
    x = torch.randn(2, 3, 65, 64, dtype=torch.float64)
    for got, wanted in zip(merged(x), subnet(x), strict=True):
        assert relative_error(got, wanted) <= 1e-10


@torch.no_grad()
def test_a_vit_whose_positions_are_resampled_folds_its_norms():
    """Its code asks for sizes, in one of timm's functions that tracers are told not to look into."""
    torch.manual_seed(0)
    model = ModelSource.make(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, depth=3, dynamic_img_size=True
    ).build()
    supernet = randomise_norms(Supernet(randomise_branches(model))).eval().double()
    supernet.set_choices({"blocks.0": "linear", "blocks.1": "linear"})
    merged = merge(supernet, (3, 48, 32))
    assert merged.merge_report.folded_norms == 1
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    assert relative_error(merged(x), supernet(x)) <= 1e-10
