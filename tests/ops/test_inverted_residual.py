"""`depthfuse.ops.inverted_residual` on a CPU: values, layouts, errors, FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.kernels.arguments import Tail, ThreeLayers
from depthfuse.kernels.depthwise import pack_weight
from depthfuse.ops import inverted_residual
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import EXACT_ACTS, assert_within

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# batch, channels, (height, width), hidden, outputs, kernel, stride
CASES = {
    "skip": (2, 6, (5, 7), 12, 6, 3, 1),
    "stride_2": (1, 5, (7, 6), 9, 4, 3, 2),
    "5x5": (2, 4, (3, 8), 8, 6, 5, 2),
    "1x1_image": (3, 8, (1, 1), 16, 8, 3, 1),
    "wide": (1, 96, (3, 3), 8, 80, 3, 1),
}


def sparse(shape, dtype):
    """Few ones and minus ones: sums stay exact in float16 and, over these sizes, in bfloat16 too."""
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.25)).to(dtype)


def noise(shape, dtype):
    return torch.randn(shape).to(dtype)


def operands(case, dtype, make):
    """(x, weights and biases w1 b1 w2 b2 w3, tail b3 residual scale shift)."""
    batch, channels, image, hidden, outputs, kernel, stride = case
    size = [(extent - 1) // stride + 1 for extent in image]
    shapes = [
        (hidden, channels, 1, 1),
        (hidden,),
        (hidden, 1, kernel, kernel),
        (hidden,),
        (outputs, hidden, 1, 1),
    ]
    tail = [(outputs,), (batch, outputs, *size), (outputs,), (outputs,)]
    x = make((batch, channels, *image), dtype)
    return x, [make(shape, dtype) for shape in shapes], [make(shape, dtype) for shape in tail]


def wanted(x, inner, tail, stride, act_inner, act):
    """The oracle's value and error."""
    return oracle.inverted_residual(x, ThreeLayers(*inner), Tail(*tail, act), stride, act_inner)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_integers_are_exact(case, act, dtype):
    x, inner, tail = operands(case, dtype, sparse)
    y = inverted_residual(x, *inner, *tail, stride=case[-1], act_inner="relu", act=act)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.double(), wanted(x, inner, tail, case[-1], "relu", act)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_inner", ["relu6", "gelu", "silu", "hardswish"])
def test_error_bound(act_inner, dtype):
    for case in CASES.values():
        x, inner, tail = operands(case, dtype, noise)
        for act, terms in (("none", tail), ("relu", [None] * 4)):
            y = inverted_residual(x, *inner, *terms, stride=case[-1], act_inner=act_inner, act=act)
            assert_within(y, *wanted(x, inner, terms, case[-1], act_inner, act))


def test_any_layout_and_packed_weights():
    x, inner, tail = operands(CASES["skip"], torch.float32, sparse)
    plain = inverted_residual(x, *inner, *tail)
    w1, b1, w2, b2, w3 = inner
    b3, residual, scale, shift = tail
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    strided = torch.stack([b1, b1], dim=1)[:, 0]
    other = residual.contiguous(memory_format=torch.channels_last)
    packed = pack_weight(w2)
    assert torch.equal(inverted_residual(turned, w1, strided, packed, b2, w3, b3, other, scale, shift), plain)


X = torch.zeros(2, 6, 5, 5)
OPERANDS = {
    "x": X,
    "w1": torch.zeros(12, 6, 1, 1),
    "b1": torch.zeros(12),
    "w2": torch.zeros(12, 1, 3, 3),
    "b2": torch.zeros(12),
    "w3": torch.zeros(6, 12, 1, 1),
    "b3": torch.zeros(6),
    "residual": X,
}
BAD = {
    "x not 4d": (ValueError, {"x": X[0]}, ["x", "[6, 5, 5]", "[N, C, H, W]"]),
    "no pixel": (ValueError, {"x": X[..., :0]}, ["x", "[2, 6, 5, 0]", "at least one pixel"]),
    "w1 channels": (ValueError, {"w1": torch.zeros(12, 7, 1, 1)}, ["w1", "[12, 7, 1, 1]", "[12, 6, 1, 1]"]),
    "w1 3x3": (ValueError, {"w1": torch.zeros(12, 6, 3, 3)}, ["w1", "[12, 6, 3, 3]", "[12, 6, 1, 1]"]),
    "w1 not 4d": (ValueError, {"w1": torch.zeros(12, 6)}, ["w1", "[12, 6]", "[hidden, C, 1, 1]"]),
    "w2 dense": (ValueError, {"w2": torch.zeros(12, 12, 3, 3)}, ["w2", "[12, 12, 3, 3]", "[12, 1, 3, 3]"]),
    "w2 oblong": (ValueError, {"w2": torch.zeros(12, 1, 5, 3)}, ["w2", "[12, 1, 5, 3]", "[12, 1, 3, 3]"]),
    "w2 even": (ValueError, {"w2": torch.zeros(12, 1, 4, 4)}, ["w2", "[12, 1, 4, 4]", "odd"]),
    "w3 hidden": (ValueError, {"w3": torch.zeros(6, 11, 1, 1)}, ["w3", "[6, 11, 1, 1]", "[6, 12, 1, 1]"]),
    "b1": (ValueError, {"b1": torch.zeros(6)}, ["b1", "[6]", "[12]"]),
    "b2": (ValueError, {"b2": torch.zeros(1)}, ["b2", "[1]", "[12]"]),
    "b3": (ValueError, {"b3": torch.zeros(12)}, ["b3", "[12]", "[6]"]),
    "residual": (ValueError, {"residual": X[:1]}, ["residual", "[1, 6, 5, 5]", "[2, 6, 5, 5]"]),
    "residual at stride 2": (ValueError, {"stride": 2}, ["residual", "[2, 6, 5, 5]", "[2, 6, 3, 3]"]),
    "scale": (ValueError, {"scale": torch.zeros(1, 6)}, ["scale", "[1, 6]", "[6]"]),
    "stride": (ValueError, {"stride": 0}, ["stride", "0", "at least 1"]),
    "act": (ValueError, {"act": "mish"}, ["'mish'", "hardswish"]),
    "act_inner": (ValueError, {"act_inner": ""}, ["''", "hardswish"]),
    "dtype mix": (
        TypeError,
        {"w2": torch.zeros(12, 1, 3, 3).half()},
        ["w2", "torch.float16", "torch.float32"],
    ),
    "device": (ValueError, {"b2": torch.zeros(12, device="meta")}, ["b2", "meta", "cpu"]),
    "backend": (ValueError, {"backend": "cuda"}, ["'cuda'", "auto", "triton", "reference"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    kind, change, words = BAD[case]
    with pytest.raises(kind) as caught:
        inverted_residual(**{**OPERANDS, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("case", ["skip", "stride_2", "5x5"])
def test_flops_as_three_convolutions(case):
    x, inner, tail = operands(CASES[case], torch.float32, noise)
    stride = CASES[case][-1]
    with FlopCounterMode(display=False) as fused:
        inverted_residual(x, *inner, *tail, stride=stride)
    with FlopCounterMode(display=False) as plain:
        y = F.conv2d(x, inner[0])
        F.conv2d(F.conv2d(y, inner[2], None, stride, inner[2].shape[-1] // 2, groups=y.shape[1]), inner[4])
    assert fused.get_total_flops() == plain.get_total_flops() > 0
