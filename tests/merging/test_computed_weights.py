"""Layers that compute their weights (pruning, weight and spectral norm, parametrisations): merged exactly, as plain
weights, and the user's model keeps its own.
"""

import copy
import warnings

import pytest
import torch
from nets import build, random_subnet, randomise_norms
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from depthfuse import Supernet, merge
from depthfuse.errors import MergeError, SpecError
from depthfuse.merging.computed_weights import compute_weights
from depthfuse.merging.folding import fold_batch_norms
from depthfuse.merging.merge import merged_structure


class Tanh(nn.Module):
    def forward(self, weight):
        return weight.tanh()


def old(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        function(*args)


def prune_twice(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "weight", 0.2)
    if layer.bias is not None:
        prune.random_unstructured(layer, "bias", 0.5)


def norm_and_prune(layer):
    old(nn.utils.weight_norm, layer)
    prune.random_unstructured(layer, "weight_v", 0.3)


def parametrise(layer):
    parametrize.register_parametrization(layer, "weight", Tanh())
    if layer.bias is not None:
        parametrize.register_parametrization(layer, "bias", Tanh())


WAYS = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned twice": prune_twice,
    "old weight norm": lambda layer: old(nn.utils.weight_norm, layer),
    "weight norm": parametrizations.weight_norm,
    "old spectral norm": lambda layer: old(nn.utils.spectral_norm, layer),
    "spectral norm": parametrizations.spectral_norm,
    "parametrised": parametrise,
    "old weight norm, pruned": norm_and_prune,
}
FAMILIES = ["resnet_d", "mobilenet", "convnext", "vit"]


def computing(family, way, shift=True):
    """A net all of whose convolutions and linear layers compute their weights, from tensors that have moved since."""
    model, size = build(family)
    if way == "old weight norm, pruned":  # which PyTorch itself cannot cast later
        model.double()
    for layer in list(model.modules()):
        if type(layer) in (nn.Conv2d, nn.Linear):
            WAYS[way](layer)
    with torch.no_grad():
        model(images(model, 1, size))
        if shift:  # as a step of an optimiser does
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval(), size


def images(model, count, size):
    return torch.randn(count, *size, dtype=next(model.parameters()).dtype)


def everything_in(model):
    """All that a model is, byte by byte: tensors, those outside the state dict too, classes and hooks."""
    found = []
    for path, module in model.named_modules():
        found.append(
            (path, id(type(module)), module.training, [id(h) for h in module._forward_pre_hooks.values()])
        )
        own = [
            *module._parameters.items(),
            *module._buffers.items(),
            *sorted(module.__dict__.items(), key=lambda i: i[0]),
        ]
        for name, value in own:
            if isinstance(value, torch.Tensor):
                found.append((path, name, id(value), value.detach().numpy().tobytes()))
    return found


def relative_error(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_equals_unmerged_and_has_plain_weights(family, way):
    model, size = computing(family, way)
    before = everything_in(model)
    supernet = Supernet(model).eval()
    assert everything_in(model) == before
    x = images(model, 2, size)
    model(x)  # of two hooks on a layer the second one is late by a call
    assert torch.equal(supernet(x), model(x))
    before = everything_in(model)  # the model's own call sets its weights
    for seed in range(2):
        subnet = random_subnet(model, seed, everything=seed == 1)
        subnet.double()
        merged = merge(subnet, size)
        x = torch.randn(2, *size, dtype=torch.float64)
        assert relative_error(merged(x), subnet(x)) <= 1e-10
        assert not any(m._forward_pre_hooks or parametrize.is_parametrized(m) for m in merged.modules())
        plain = merged_structure(subnet.spec()).double()
        plain.load_state_dict(merged.state_dict())  # the names of a merged plain model, no more and no less
        assert relative_error(plain(x), subnet(x)) <= 1e-10
    assert everything_in(model) == before


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_net_that_was_trained_after_its_weights_were_last_computed(way):
    """The pruned block reads weights of layers that it never calls."""
    model, size = computing("mobilenet", way)
    subnet = random_subnet(model, 3, everything=True).double()
    x = torch.randn(2, *size, dtype=torch.float64)
    for parameter in subnet.parameters():
        parameter.mul_(1.1)
    wanted = subnet(x)
    plain = copy.deepcopy(subnet)
    compute_weights(plain)
    assert relative_error(plain(x), wanted) <= 1e-12
    assert relative_error(merge(subnet, size)(x), wanted) <= 1e-10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["mobilenet", "vit"])
def test_pruned_blocks_train_what_weights_are_computed_from(family, way):
    """More than one step, and masks hold: computed weights have a graph of their own in each."""
    model, size = computing(family, way)
    supernet = Supernet(model).train()
    path, names = next(iter(supernet.options().items()))
    for lam in (0.5, 0.0, 0.0):
        supernet.set_choices({path: names[0]}, lam)
        supernet.zero_grad()
        supernet(images(model, 3, size)).square().mean().backward()
        computed = [
            p
            for n, p in supernet.blocks[path].block.named_parameters()
            if n.endswith(("_orig", "_g", "original", "original0"))
        ]
        assert computed and all(
            p.grad is not None and p.grad.isfinite().all() for p in computed if p.ndim > 1
        )
        with torch.no_grad():
            for parameter in supernet.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-2 * parameter.grad
    merge(
        supernet.eval(), size
    )  # after training computed weights have a gradient, which PyTorch refuses to copy
    merge(supernet.subnet(supernet.spec()), size)
    assert copy.deepcopy(supernet).choices() == supernet.choices()


@torch.no_grad()
def test_a_spectral_norm_takes_no_step_while_a_supernet_is_made():
    """It does so whenever its weight is read in training mode."""
    for way in ("spectral norm", "old spectral norm"):
        model, size = computing("vit", way)
        model.train()
        before = everything_in(model)
        supernet = Supernet(model)
        assert everything_in(model) == before
        x = torch.randn(1, *size)
        assert torch.equal(supernet.eval()(x), model.eval()(x))


@torch.no_grad()
def test_weights_that_share_their_origin_stay_apart():
    """A mask of one layer says nothing of another layer with the same weight."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].weight = model[2].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", 0.5)
    parametrize.register_parametrization(model[1], "weight", Tanh())
    x = torch.randn(2, 4, 3, 3)
    model.eval()
    wanted = model(x)
    compute_weights(model)
    assert torch.equal(model(x), wanted)
    assert sorted(model.state_dict()) == [f"{i}.{name}" for i in range(3) for name in ("bias", "weight")]


@torch.no_grad()
def test_frozen_weights_stay_frozen():
    layers = []
    for way in WAYS.values():
        layer = nn.Linear(3, 3)
        way(layer)
        layers.append(layer)
    model = nn.Sequential(*layers).requires_grad_(False)
    compute_weights(model)
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_computed_norm_weights_merge_too():
    model, size = build("resnet")
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        parametrize.register_parametrization(norm, "weight", Tanh())
        prune.random_unstructured(norm, "bias", 0.3)
    before = everything_in(model)
    subnet = random_subnet(model, everything=True).double()
    x = torch.randn(2, *size, dtype=torch.float64)
    assert relative_error(merge(subnet, size)(x), subnet(x)) <= 1e-10
    with pytest.raises(SpecError, match=r"computes its weight .* separate_norms=True"):
        Supernet(model, separate_norms=False)
    assert everything_in(model) == before


@torch.no_grad()
def test_norms_beside_layers_that_compute_their_weights_are_not_folded():
    for way in WAYS.values():
        model = randomise_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()).eval())
        way(model[0])
        x = torch.randn(2, 3, 5, 6)
        wanted = model(x)
        assert fold_batch_norms(model) == 0
        assert torch.equal(model(x), wanted)


def test_a_weight_that_is_random_at_every_call_is_refused():
    class Noise(nn.Module):
        def forward(self, weight):
            return weight + 0.1 * torch.randn_like(weight)

    model, size = build("resnet")
    parametrize.register_parametrization(model.layer1[0].conv1, "weight", Noise())
    supernet = Supernet(model).eval()
    supernet.set_choices({"layer1.0": "compact"})
    with pytest.raises(MergeError, match=r"merging changed the model by .*layer1\.0"):
        merge(supernet, size)


@pytest.mark.parametrize("kind", ["pre", "post"])
@torch.no_grad()
def test_blocks_with_hooks_inside_are_refused_by_name_and_norms_keep_theirs(kind):
    model, size = build("resnet")
    twice = {
        "pre": lambda m: m.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
        "post": lambda m: m.register_forward_hook(lambda _, args, out: 2 * out),
    }[kind]
    for path in ("layer1.0.conv2", "layer2.0", "conv1"):
        twice(model.get_submodule(path))
    subnet = random_subnet(model, everything=True).double()
    assert not {"layer1.0", "layer2.0"} & set(subnet.options())
    x = torch.randn(2, *size, dtype=torch.float64)
    assert relative_error(merge(subnet, size)(x), subnet(x)) <= 1e-10
    from depthfuse.merging.adapters import find_blocks

    reasons = {info.path: info.reason for info in find_blocks(model) if not info.candidates}
    assert reasons["layer1.0"].startswith("conv2 has a forward hook")
    assert reasons["layer2.0"].startswith("the block itself has a forward hook")


def test_what_cannot_be_copied_is_refused_by_name():
    model, _ = build("resnet")
    model.source = (line for line in ())
    with pytest.raises(MergeError, match=r"ResNet cannot be copied .*never altered.*let it hold"):
        Supernet(model)
