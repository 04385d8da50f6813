"""Branches over one value: one convolution where that is exact and saves something, else left alone."""

import copy

import pytest
import torch
from nets import randomise_norms
from torch import nn

from depthfuse import accelerate
from depthfuse.fused.layers import FusedConv2d
from depthfuse.measuring.accuracy import relative_error


class Branches(nn.Module):
    """A sum of branches of one value, then a ReLU; `others` are read besides."""

    def __init__(self, *branches, reads_one_more=False):
        super().__init__()
        self.stem, self.branches, self.reads_one_more = (
            nn.Conv2d(3, 8, 1),
            nn.ModuleList(branches),
            reads_one_more,
        )

    def forward(self, x):
        x = self.stem(x)
        values = [branch(x) for branch in self.branches]
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total.relu() + (values[0].mean() if self.reads_one_more else 0)


def conv(kernel, groups=1, stride=1, dilation=1, out=8):
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(8, out, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out))


def convolutions(model, x):
    """How many of the plan, after it was compared with the model in float64."""
    torch.manual_seed(0)
    model = randomise_norms(model).eval()
    fast = accelerate(model, x, tune="off")
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
        assert relative_error(fast(x), wanted) < max(1e-6, 3 * relative_error(model(x), wanted))
        other = torch.randn(3, 3, 8, 14)
        assert relative_error(fast(other), copy.deepcopy(model).double()(other.double())) < 2e-6
    return sum(isinstance(m, FusedConv2d) for m in fast.plan.modules())


@pytest.mark.parametrize(
    "branches",
    [
        (conv(3), conv(1), nn.BatchNorm2d(8)),
        (nn.BatchNorm2d(8), conv(1), conv(3)),
        (conv(3), nn.Conv2d(8, 8, 3, padding=1)),
        (conv(3, groups=8), conv(1, groups=8), nn.BatchNorm2d(8)),
        (conv(3, stride=2, out=12), conv(1, stride=2, out=12)),
        (conv(7, groups=8), conv(5, groups=8), conv(3, groups=8)),
        (conv(3, groups=2), conv(3, groups=2)),
        (conv(3), conv(5), conv(3, dilation=2)),
    ],
    ids=[
        "RepVGG",
        "any order",
        "without a norm",
        "MobileOne",
        "stride",
        "large kernels",
        "groups",
        "dilation",
    ],
)
def test_branches_become_one_convolution(branches):
    assert convolutions(Branches(*branches), torch.randn(2, 3, 12, 10)) == 2  # the stem's, and theirs


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (Branches(conv(3, groups=8), conv(1)), 3),  # a dense 3x3 would cost more than both
        (Branches(conv(3), conv(1), reads_one_more=True), 3),
        (Branches(conv(3, stride=2), nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1))), 3),
        (Branches(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), 1),
        (Branches(conv(3), nn.Sequential(nn.ReLU(), conv(1))), 3),
    ],
    ids=["cost", "two readers", "another value", "no convolution", "nothing linear"],
)
def test_what_is_no_sum_of_convolutions_stays(model, count):
    assert convolutions(model, torch.randn(2, 3, 12, 10)) == count


def test_in_training_mode_norms_are_refused_as_ever():
    model = Branches(conv(3), conv(1)).train()
    with pytest.raises(Exception, match="eval"):
        accelerate(model, torch.randn(2, 3, 8, 8), tune="off")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(dtype):
    torch.manual_seed(0)
    model = randomise_norms(Branches(conv(3), conv(1), nn.BatchNorm2d(8))).eval()
    x = torch.randn(2, 3, 12, 10)
    fast = accelerate(model, x, tune="off", dtype=dtype)
    (merged,) = (m for m in fast.plan.modules() if isinstance(m, FusedConv2d) and m.weight.shape[2] == 3)
    exact = accelerate(copy.deepcopy(model).double(), x.double(), tune="off")
    (wanted,) = (m for m in exact.plan.modules() if isinstance(m, FusedConv2d) and m.weight.shape[2] == 3)
    assert torch.equal(merged.weight, wanted.weight.to(dtype))


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_networks_as_they_are_trained(name):
    """As many convolutions as the library's own re-parameterisation leaves, and the same values."""
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    torch.manual_seed(0)
    model = randomise_norms(timm.create_model(name, num_classes=5)).eval()
    fast = accelerate(model, torch.randn(1, 3, 64, 64), tune="off")
    x = torch.randn(2, 3, 64, 64)
    merged = reparameterize_model(model)
    count = sum(isinstance(m, nn.Conv2d) for m in merged.modules())
    assert sum(isinstance(m, FusedConv2d) for m in fast.plan.modules()) == count
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-5
