"""The distance between the blocks of a net and of its teacher: exact, with gradients, and part of the loss as asked."""

import copy

import pytest
import torch
from torch import nn

from depthfuse import SubnetSpec, Supernet
from depthfuse.spec import ModelSource
from depthfuse.training.features import feature_loss, recorded
from depthfuse.training.objectives import ProgressiveObjective

CHOICES = {"layer1.0": "compact", "layer3.0": "dense"}


def net():
    source = ModelSource.make(
        "resnet18", channels=(8, 12, 16, 24), layers=(1, 1, 1, 1), in_chans=1, num_classes=10
    )
    built = source.build().eval()
    for module in built.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # timm's last norm of a block starts at zero, and would hide the rest
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return built


def objective(teacher, **settings):
    supernet = Supernet(net())
    subnet = supernet.subnet(SubnetSpec.from_mapping(supernet.source, CHOICES)).eval()
    return ProgressiveObjective(subnet, teacher=teacher, share=0.5, **settings)


def test_the_squared_error_over_the_variance():
    wanted = {"a": torch.tensor([0.0, 2.0, 4.0, 6.0]), "b": torch.tensor([1.0, -1.0])}  # variances 5 and 1
    given = {"a": torch.tensor([0.0, 2.0, 4.0, 16.0]), "b": torch.tensor([1.0, 0.0])}  # errors 25 and 0.5
    assert feature_loss(given, wanted).item() == (25 / 5 + 0.5 / 1) / 2


def test_a_constant_block_gives_a_number():
    loss = feature_loss({"a": torch.zeros(4)}, {"a": torch.zeros(4)})
    assert loss.item() == 0.0


def test_what_the_next_module_overwrites_was_kept():
    layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    x = torch.randn(5, 3)
    with recorded(layers, ["0"]) as outputs:
        layers(x)
    torch.testing.assert_close(outputs["0"], layers[0](x), rtol=0, atol=0)
    assert (outputs["0"] < 0).any()
    assert not layers[0]._forward_hooks


def test_a_net_whose_blocks_are_the_teachers_is_at_no_distance():
    teacher = net()
    step = objective(teacher, features=1.0)
    with recorded(step.net.model, list(step.net.blocks)) as outputs:
        step.net.set_lambda(1.0)
        step.net.load_state_dict(step.net.state_dict() | _state_of(teacher, step.net))
        step.net(torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    with recorded(teacher, list(step.net.blocks)) as wanted:
        teacher(torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert set(outputs) == set(CHOICES)
    assert feature_loss(outputs, wanted).item() == 0.0


def _state_of(teacher, subnet):
    """The teacher's weights by the names that they have in a subnet."""
    with_switches = Supernet(copy.deepcopy(teacher))
    with_switches = with_switches.subnet(SubnetSpec.from_mapping(with_switches.source, CHOICES))
    known = subnet.state_dict()
    return {name: value for name, value in with_switches.state_dict().items() if name in known}


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_the_loss_has_it_with_the_weight_asked_for(distill):
    teacher = net()
    images, labels = torch.randn(6, 1, 32, 32), torch.arange(6)
    step = objective(teacher, distill=distill, features=0.25)
    step.net.requires_grad_(True)
    with_features = step(images, labels, 1.0)
    step.features = 0.0
    without = step(images, labels, 1.0)
    paths = list(step.net.blocks)
    with recorded(teacher, paths) as wanted, recorded(step.net.model, paths) as outputs:
        teacher(images)
        step.net(images)
    expected = without + 0.25 * feature_loss(outputs, wanted)
    torch.testing.assert_close(with_features, expected, rtol=1e-6, atol=0)
    assert (with_features - without).item() > 1e-3
    with_features.backward()
    assert step.net.model.get_submodule("layer1.0").block.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_without_a_teacher_there_is_nothing_to_be_distant_from():
    step = objective(None, features=1.0)
    images, labels = torch.randn(4, 1, 32, 32), torch.arange(4)
    step.features, with_features = 0.0, step(images, labels, 1.0)
    torch.testing.assert_close(with_features, step(images, labels, 1.0), rtol=0, atol=0)
