"""`depthfuse.ops.mlp` on a CPU: values, layouts, errors, FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.kernels.arguments import Tail, TwoLayers
from depthfuse.ops import mlp
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import EXACT_ACTS, assert_within, integers

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# leading axes, channels, hidden, outputs
CASES = {
    "rows": ((5,), 8, 16, 6),
    "image": ((2, 3, 4), 7, 9, 7),
    "one": ((), 12, 24, 12),
    "wide": ((3,), 300, 8, 5),
}


def noise(shape, dtype):
    return torch.randn(shape).to(dtype)


def sparse(shape, dtype):
    """Few ones and minus ones: sums stay exact in bfloat16 too."""
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.2)).to(dtype)


def operands(case, dtype, make):
    """(x, [w1, b1, w2], tail b2 residual scale shift)."""
    lead, channels, hidden, outputs = case
    inner = [make(shape, dtype) for shape in ((hidden, channels), (hidden,), (outputs, hidden))]
    tail = [make(shape, dtype) for shape in ((outputs,), (*lead, outputs), (outputs,), (outputs,))]
    return make((*lead, channels), dtype), inner, tail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_integers_are_exact(case, act, dtype):
    x, inner, tail = operands(case, dtype, sparse)
    y = mlp(x, *inner, *tail, act_inner="relu", act=act)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(y.double(), oracle.mlp(x, TwoLayers(*inner), Tail(*tail, act), "relu").value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_inner", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_error_bound(norm_eps, act_inner, dtype):
    for case in CASES.values():
        x, inner, tail = operands(case, dtype, noise)
        for act, terms in (("none", tail), ("relu", [None] * 4)):
            y = mlp(x, *inner, *terms, act_inner=act_inner, act=act, norm_eps=norm_eps)
            assert_within(y, *oracle.mlp(x, TwoLayers(*inner), Tail(*terms, act), act_inner, norm_eps))


def test_without_any_bias():
    x, (w1, _, w2), _ = operands(CASES["rows"], torch.float32, integers)
    assert torch.equal(mlp(x, w1, None, w2, act_inner="relu"), (x @ w1.T).relu() @ w2.T)


def test_any_layout():
    x, (w1, b1, w2), (b2, residual, scale, shift) = operands(CASES["image"], torch.float32, integers)
    plain = mlp(x, w1, b1, w2, b2, residual, scale, shift, act_inner="relu")
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    column = w1.T.contiguous().T
    strided = torch.stack([scale, scale], dim=1)[:, 0]
    other = residual.transpose(1, 2).contiguous().transpose(1, 2)
    y = mlp(turned, column, b1, w2, b2, other, strided, shift, act_inner="relu")
    assert y.is_contiguous()
    assert torch.equal(y, plain)


X = torch.zeros(2, 5, 6)
OPERANDS = {
    "x": X,
    "w1": torch.zeros(12, 6),
    "b1": torch.zeros(12),
    "w2": torch.zeros(8, 12),
    "b2": torch.zeros(8),
    "residual": torch.zeros(2, 5, 8),
}
BAD = {
    "features": (ValueError, {"x": torch.zeros(2, 7)}, ["x", "[2, 7]", "[..., 6]", "[12, 6]"]),
    "x is a number": (ValueError, {"x": torch.tensor(1.0)}, ["x", "[]", "[..., 6]"]),
    "w1 not 2d": (ValueError, {"w1": torch.zeros(12, 6, 1)}, ["w1", "[12, 6, 1]", "[hidden, C]"]),
    "w2 not 2d": (ValueError, {"w2": torch.zeros(12)}, ["w2", "[12]", "[K, hidden]"]),
    "w2 hidden": (ValueError, {"w2": torch.zeros(8, 11)}, ["w2", "[8, 11]", "[8, 12]"]),
    "b1": (ValueError, {"b1": torch.zeros(8)}, ["b1", "[8]", "[12]"]),
    "b2": (ValueError, {"b2": torch.zeros(12)}, ["b2", "[12]", "[8]"]),
    "scale": (ValueError, {"scale": torch.zeros(8, 1)}, ["scale", "[8, 1]", "[8]"]),
    "residual": (ValueError, {"residual": X}, ["residual", "[2, 5, 6]", "[2, 5, 8]"]),
    "norm_eps": (ValueError, {"norm_eps": -1e-6}, ["norm_eps", "-1e-06", "at least 0"]),
    "dtype mix": (TypeError, {"w2": torch.zeros(8, 12).double()}, ["w2", "torch.float64", "torch.float32"]),
    "device": (ValueError, {"w1": torch.zeros(12, 6, device="meta")}, ["w1", "meta", "cpu"]),
    "act_inner": (ValueError, {"act_inner": "GELU"}, ["'GELU'", "gelu_tanh"]),
    "backend": (ValueError, {"backend": "cuda"}, ["'cuda'", "auto", "triton", "reference"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    kind, change, words = BAD[case]
    with pytest.raises(kind) as caught:
        mlp(**{**OPERANDS, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flops_as_two_linear_layers(case):
    x, (w1, b1, w2), tail = operands(case, torch.float32, noise)
    with FlopCounterMode(display=False) as fused:
        mlp(x, w1, b1, w2, *tail, norm_eps=1e-6)
    with FlopCounterMode(display=False) as plain:
        F.linear(F.linear(x, w1), w2)
    assert fused.get_total_flops() == plain.get_total_flops() > 0
