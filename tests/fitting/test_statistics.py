"""Batch norms are brought to what those of the original net gave."""

import pytest
import timm
import torch
from torch import nn

from depthfuse.fitting.statistics import match_moments, output_moments
from depthfuse.merging.merged_blocks import TokenBatchNorm


def batches(count=3, seed=0, size=32):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, size, size, generator=rng) for _ in range(count)]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
@torch.no_grad()
def test_a_net_that_was_not_changed_stays_as_it_is(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5)
    for x in batches(6, seed=1):
        net.train()(x)
    net.eval().double()
    images = [x.double() for x in batches()]
    before = net(images[0])
    match_moments(net, images, output_moments(net, images))
    assert (net(images[0]) - before).abs().max() < 1e-6 * before.abs().max()


@torch.no_grad()
def test_what_changed_before_a_norm_is_undone():
    torch.manual_seed(0)
    first, norm, second, last = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
    )
    norm.weight.uniform_(0.5, 2.0).mul_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    norm.bias.normal_()
    net = nn.Sequential(first, norm, nn.ReLU(), second, last).double().eval()
    images = [x.double() for x in batches()]
    wanted, before = output_moments(net, images), net(images[1])
    first.weight *= 3.0
    first.bias -= 2.0
    last.running_mean += 1.0
    assert (net(images[1]) - before).abs().max() > 0.1
    match_moments(net, images, wanted)
    assert (net(images[1]) - before).abs().max() < 1e-5


@torch.no_grad()
def test_tokens():
    norm = TokenBatchNorm(4).double().eval()
    net = nn.Sequential(nn.Linear(4, 4), norm).double().eval()
    tokens = [torch.randn(2, 7, 4, dtype=torch.float64) for _ in range(2)]
    wanted, before = output_moments(net, tokens), net(tokens[0])
    net[0].weight *= 2.0
    net[0].bias.add_(1.0)
    match_moments(net, tokens, wanted)
    # the bias of the layer was scaled less than its weights, by a shift that the norm takes away
    assert torch.allclose(net(tokens[0]), before, atol=1e-4)


@torch.no_grad()
def test_norms_that_are_not_run_and_dead_channels_keep_theirs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.used(x)

    net = Net().eval()
    net.used.weight[1] = 0.0
    for norm in (net.used, net.idle):
        norm.running_mean.fill_(0.25)
    images = [x + 5 for x in batches()]
    wanted = output_moments(net, images)
    match_moments(net, [2 * x for x in images], wanted)
    assert net.idle.running_mean.tolist() == [0.25] * 3
    assert net.used.running_mean[1] == 0.25
    assert torch.isfinite(net.used.running_var).all()
    assert torch.allclose(net(2 * images[0])[:, 0], (images[0][:, 0] - 0.25) / (1 + 1e-5) ** 0.5, atol=1e-3)
