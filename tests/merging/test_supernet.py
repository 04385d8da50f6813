"""Switches over shared weights: bit-equal at baseline, smooth in lambda, separate norms, honest re-calibration."""

import copy
import random

import pytest
import torch
from nets import SMALL, build, each_candidate, randomise_norms
from torch import nn

from depthfuse import ModelSource, SubnetSpec, Supernet, recalibrate
from depthfuse.errors import SpecError


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
    images = torch.randn(2, *size, dtype=torch.float64)
    for path, name, block, x in each_candidate(supernet, images):
        for mixing in ("op", "block"):
            block.mixing = mixing
            outputs = {}
            for lam in (1.0, 1 - 1e-9, 0.5, 1e-9, 0.0):
                block.lam = lam
                outputs[lam] = block(x.clone())
            scale = outputs[1.0].abs().max() + outputs[0.0].abs().max()
            where = path, name, mixing
            assert (outputs[1.0] - outputs[1 - 1e-9]).abs().max() <= 1e-6 * scale, where
            assert (outputs[0.0] - outputs[1e-9]).abs().max() <= 1e-6 * scale, where
            assert (outputs[0.0] - outputs[1.0]).abs().max() > 1e-2 * scale, where
            if mixing == "block":
                half = (outputs[0.0] + outputs[1.0]) / 2
                torch.testing.assert_close(outputs[0.5], half, rtol=0, atol=1e-12 * float(scale))


@pytest.mark.parametrize("family", SMALL)
def test_training_reaches_shared_and_separate_weights(family):
    model, size = build(family)
    supernet = Supernet(model).train()
    for path, name, block, x in each_candidate(supernet, torch.randn(4, *size)):
        for lam in (0.0, 0.5):
            supernet.zero_grad()
            block.lam = lam
            x = x.detach().requires_grad_()  # where nothing of a block is left, nothing else has a gradient
            block(x.clone()).square().mean().backward()
            for key, parameter in block.candidates[name].named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), (path, name, key)
            if lam or name == next(iter(block.candidates)):
                shared = [p for p in block.block.parameters() if p.ndim > 1]
                assert all(p.grad is not None for p in shared), (path, name)


@pytest.mark.parametrize("family", SMALL)
def test_a_gate_gives_the_same_values_and_gets_a_gradient(family):
    """A learned lambda: also at 0 and 1, where a number would leave one side out."""
    model, size = build(family)
    supernet = randomise_norms(Supernet(model)).eval().double()
    images = torch.randn(2, *size, dtype=torch.float64)
    for path, name, block, x in each_candidate(supernet, images):
        ramps = {"op": (0.0, 0.3, 1.0), "block": (0.0,)}
        if block.candidates[name].layer_norms:
            ramps["norm"] = (0.0, 1.0)
        for mixing, values in ramps.items():
            block.mixing = mixing
            for value in values:
                where = path, name, mixing, value
                block.lam = value
                with torch.no_grad():
                    wanted = block(x)
                gate = torch.tensor(
                    value, requires_grad=True
                )  # float32, as a gate beside a float64 net may be
                block.lam = gate
                got = block(x)
                atol = 1e-11 if value in (0.0, 1.0) else 1e-6
                assert (got - wanted).abs().max() <= atol * wanted.abs().max(), where
                (gradient,) = torch.autograd.grad(got.square().mean(), gate)
                assert gradient.isfinite() and gradient != 0, where


def test_a_gate_stays_its_owners():
    model, size = build("resnet")
    supernet = Supernet(model).train()
    keys, parameters = list(supernet.state_dict()), len(list(supernet.parameters()))
    gate = nn.Parameter(torch.tensor(0.5))
    supernet.set_choices({"layer1.0": "compact"})
    supernet.blocks["layer1.0"].lam = gate
    assert list(supernet.state_dict()) == keys and len(list(supernet.parameters())) == parameters
    supernet(torch.randn(2, *size)).sum().backward()
    assert gate.grad is not None and gate.grad.isfinite()
    supernet.set_choices(supernet.choices(), 0.25)
    assert supernet.blocks["layer1.0"].lam == 0.25
    assert copy.deepcopy(supernet).blocks["layer1.0"].lam == 0.25


@pytest.mark.parametrize("family", ["resnet", "convnext", "convnext_linear", "vit"])
@torch.no_grad()
def test_norm_mixing_ramps_the_norms_alone(family):
    model, size = build(family)
    supernet = randomise_norms(Supernet(model)).eval().double()
    images = torch.randn(2, *size, dtype=torch.float64)
    for path, name, block, x in each_candidate(supernet, images):
        block.mixing = "norm"
        outputs = []
        for lam in (0.0, 1e-9, 1.0):
            block.lam = lam
            outputs.append(block(x))
        pruned, close, with_layer_norms = outputs
        block.mixing, block.lam = "op", 0.0
        assert torch.equal(pruned, block(x)), (path, name)
        block.mixing = "norm"
        if not block.candidates[name].layer_norms:
            assert torch.equal(with_layer_norms, pruned), (path, name)
            continue
        assert (close - pruned).abs().max() <= 1e-6 * pruned.abs().max(), (path, name)
        # at 1 the batch norms in the place of LayerNorms have no say, the others have
        own = block.candidates[name]
        for norm in ("norm", "norm1", "norm2"):
            if hasattr(own, norm):
                nn.init.normal_(getattr(own, norm).bias)
        block.lam = 1.0
        assert torch.equal(block(x), with_layer_norms), (path, name)
        nn.init.normal_(own.tail_norm.bias)
        assert not torch.equal(block(x), with_layer_norms), (path, name)


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_random_mixing_takes_the_original_with_probability_lambda(family):
    model, size = build(family)
    supernet = randomise_norms(Supernet(model)).eval().double()
    path, name, block, x = next(each_candidate(supernet, torch.randn(2, *size, dtype=torch.float64)))
    block.mixing = "op"
    ends = []
    for block.lam in (1.0, 0.0):
        ends.append(block(x))
    block.lam = 0.25
    mixed = block(x)
    block.mixing = "random"
    assert torch.equal(block(x), mixed), "evaluation draws nothing"
    block.training = True  # the switch alone: layers inside keep their statistics
    originals = 0
    for _ in range(200):
        output = block(x)
        originals += torch.equal(output, ends[0])
        assert torch.equal(output, ends[0]) or torch.equal(output, ends[1]), (path, name)
    assert 25 <= originals <= 75  # of 50 expected, four standard deviations


def test_mixing_goes_with_the_subnet_and_unknown_ones_are_refused():
    model, _ = build("resnet")
    supernet = Supernet(model)
    supernet.set_mixing("block")
    subnet = supernet.subnet(SubnetSpec.from_mapping(supernet.source, {"layer1.0": "compact"}), lam=0.5)
    assert subnet.blocks["layer1.0"].mixing == "block"
    with pytest.raises(SpecError, match="unknown mixing 'blend'; known: op, block, norm, random"):
        supernet.set_mixing("blend")
    assert supernet.blocks["layer1.0"].mixing == "block"


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
    from depthfuse.merging.adapters.chain import norm_with_zero_value

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
    with pytest.raises(SpecError, match="no candidate 'tiny'; known: keep, compact, dense, identity"):
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
