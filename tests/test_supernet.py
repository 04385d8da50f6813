"""Switches over shared weights: bit-equal at baseline, smooth in lambda, separate norms, honest re-calibration."""

import random

import pytest
import torch
from nets import SMALL, build, randomise_norms
from torch import nn

from depthfuse import ModelSource, SubnetSpec, Supernet, recalibrate
from depthfuse.spec import SpecError
from depthfuse.variants import block_inputs


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_baseline_is_bit_equal_and_the_model_is_left_alone(family):
    model, size = build(family)
    keys = list(model.state_dict())
    supernet = Supernet(model).eval()
    x = torch.randn(2, *size)
    assert torch.equal(supernet(x), model(x))
    assert list(model.state_dict()) == keys
    supernet.set_choices(supernet.sample(random.Random(0)), lam=1.0)  # at the start of the ramp
    assert torch.equal(supernet(x), model(x))


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_lambda_leads_from_the_original_to_the_pruned_block(family):
    """Continuous at both ends: nothing jumps when the ramp starts or ends, borders included."""
    model, size = build(family)
    supernet = randomise_norms(Supernet(model)).eval().double()
    seen = block_inputs(supernet, torch.randn(2, *size, dtype=torch.float64))
    for path, block in supernet.blocks.items():
        for name in block.candidates:
            x = seen[path]
            block.choice = name
            outputs = {}
            for lam in (1.0, 1 - 1e-9, 0.5, 1e-9, 0.0):
                block.lam = lam
                outputs[lam] = block(x.clone())
            scale = outputs[1.0].abs().max() + outputs[0.0].abs().max()
            # odd maps under a pooled shortcut: the window at the far border changes at once, see shortcut_forward
            odd_pool = x.ndim == 4 and x.shape[-1] % 2 and "AvgPool2d" in repr(block.block)
            if not odd_pool:
                assert (outputs[1.0] - outputs[1 - 1e-9]).abs().max() <= 1e-6 * scale, (path, name)
            assert (outputs[0.0] - outputs[1e-9]).abs().max() <= 1e-6 * scale, (path, name)
            assert (outputs[0.0] - outputs[1.0]).abs().max() > 1e-2 * scale, (path, name)
            block.choice, block.lam = "keep", 0.0


@pytest.mark.parametrize("family", SMALL)
def test_training_reaches_shared_and_separate_weights(family):
    model, size = build(family)
    supernet = Supernet(model).train()
    choices = {path: names[0] for path, names in supernet.options().items()}
    x = torch.randn(4, *size)
    for lam in (0.0, 0.5):
        supernet.zero_grad()
        supernet.set_choices(choices, lam)
        supernet(x).square().mean().backward()
        for path, block in supernet.blocks.items():
            own = dict(block.candidates[choices[path]].named_parameters())
            assert own, path
            for name, parameter in own.items():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), (path, name)
            shared = [p for p in block.block.parameters() if p.ndim > 1]
            assert all(p.grad is not None for p in shared), path


def test_the_two_choices_keep_separate_statistics():
    model, size = build("mobilenet")
    supernet = Supernet(model).train()
    path, block = next(iter(supernet.blocks.items()))
    before = block.block.bn1.running_mean.clone()
    supernet.set_choices({path: "dense"})
    supernet(torch.randn(4, *size))
    assert torch.equal(block.block.bn1.running_mean, before)
    assert not torch.equal(block.candidates["dense"].norms[0].running_mean, before)


def test_fill_value_is_what_the_first_stage_gives_over_zeros():
    """In training mode too, where it depends on the batch."""
    from depthfuse.adapters.chain import norm_with_zero_value

    norm = nn.BatchNorm2d(5).double().train()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    twin = nn.BatchNorm2d(5).double().train()
    twin.load_state_dict(norm.state_dict())
    z, bias = torch.randn(3, 5, 4, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    y, zero = norm_with_zero_value(norm, bias, z)
    torch.testing.assert_close(y, twin(z))
    torch.testing.assert_close(norm.running_var, twin.running_var)
    # y is affine in z per channel: extrapolate to z = bias from two pixels
    a, b = z[0, :, 0, 0], z[0, :, 0, 1]
    ya, yb = y[0, :, 0, 0], y[0, :, 0, 1]
    torch.testing.assert_close(zero, ya + (yb - ya) * (bias - a) / (b - a))


def test_recalibration_is_a_cumulative_average_of_what_the_subnet_sees():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    batches = [torch.randn(6, 3, 5, 5) for _ in range(4)]
    recalibrate(model, batches)
    with torch.no_grad():
        seen = [model[0](b) for b in batches]
    mean = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    var = torch.stack([s.transpose(0, 1).flatten(1).var(1) for s in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert model[1].momentum == 0.1 and not model.training and not model[1].training
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(model, [])


def test_recalibration_spares_the_norms_that_are_switched_off():
    model, size = build("resnet")
    supernet = Supernet(model).eval()
    block = supernet.blocks["layer1.0"]
    supernet.set_choices({"layer1.0": "compact"})
    off = block.block.bn1.running_mean.clone()
    on = block.candidates["compact"].norms[0].running_mean.clone()
    recalibrate(supernet, [torch.randn(4, *size)])
    assert torch.equal(block.block.bn1.running_mean, off)
    assert not torch.equal(block.candidates["compact"].norms[0].running_mean, on)


@torch.no_grad()
def test_subnet_holds_only_what_was_chosen():
    model, size = build("resnet")
    supernet = randomise_norms(Supernet(model)).eval()
    spec = SubnetSpec.from_mapping(supernet.source, {"layer1.0": "dense", "layer3.1": "compact"})
    subnet = supernet.subnet(spec)
    assert subnet.options() == {"layer1.0": ["dense"], "layer3.1": ["compact"]}
    supernet.set_choices(spec)
    x = torch.randn(2, *size)
    assert torch.equal(subnet(x), supernet(x))


def test_bad_choices_change_nothing():
    model, _ = build("resnet")
    supernet = Supernet(model)
    supernet.set_choices({"layer1.0": "compact"})
    with pytest.raises(SpecError, match=r"no prunable block layer9\.0; this model has layer1\.0"):
        supernet.set_choices({"layer9.0": "compact"})
    with pytest.raises(SpecError, match="no candidate 'tiny'; known: keep, compact, dense"):
        supernet.set_choices({"layer1.0": "tiny"})
    with pytest.raises(SpecError, match="between 0 and 1"):
        supernet.set_choices({"layer1.0": "compact"}, lam=1.5)
    assert supernet.choices()["layer1.0"] == "compact"
    with pytest.raises(SpecError, match="is for 'resnet50'"):
        supernet.subnet(SubnetSpec(ModelSource.make("resnet50")))


def test_models_without_prunable_blocks_are_refused_with_reasons():
    with pytest.raises(SpecError, match="GRN or a gate"):
        Supernet(ModelSource.make("convnextv2_atto").build())
    with pytest.raises(SpecError, match="no block of a known type"):
        model = nn.Sequential(nn.Linear(2, 2))
        Supernet(model)
