"""Fused MLP: exact on integers, within its error bound on reals, blind to what lies outside."""

import pytest
import torch

from depthfuse.kernels.arguments import Tail, TwoLayers
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.kernels.mlp import mlp
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])

# leading shape of x, channels, hidden, outputs
CASES = {
    "tokens": ((2, 37), 48, 80, 48),
    "odd": ((5,), 27, 33, 40),
    "full_width": ((3, 3), 96, 64, 96),
    "one_row": ((1,), 16, 32, 16),
}


def operands(case, dtype, device, integers):
    leading, c, hidden, k = case

    def sample(*shape):
        if integers:  # sparse, so that the hidden values stay exact in float16
            return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).to(device, dtype)
        return torch.randn(shape).to(device, dtype)

    x = guarded(sample(*leading, c))
    inner = TwoLayers(*map(guarded, (sample(hidden, c), sample(hidden), sample(k, hidden))))
    return x, inner, [guarded(t) for t in (sample(k), sample(*leading, k), sample(k), sample(k))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, weights, tail = operands(case, dtype, device, integers=True)
    tail = Tail(*tail, "relu")
    y = mlp(x, weights, tail, act_inner="relu")
    assert torch.equal(y, oracle.mlp(x, weights, tail, "relu").value.to(dtype))


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound(dtype, norm_eps, act, device):
    x, weights, tail = operands(CASES["tokens"], dtype, device, integers=False)
    y = mlp(x, weights, Tail(*tail), act_inner=act, norm_eps=norm_eps)
    assert_within(y, *oracle.mlp(x, weights, Tail(*tail), act, norm_eps, sums=torch.float32))


def test_empty_batch_and_no_tail(device):
    x, weights, _ = operands(CASES["odd"], torch.float16, device, integers=True)
    weights = weights._replace(b1=None)
    assert mlp(x[:0], weights).shape == (0, 40)
    exact = oracle.mlp(x, weights, act_inner="relu").value
    assert torch.equal(mlp(x, weights, act_inner="relu"), exact.to(x.dtype))


def test_a_bad_layout_is_named(device):
    x, weights, _ = operands(CASES["odd"], torch.float32, device, integers=True)
    for bad_x, bad_weights, name in (
        (x.T.contiguous().T, weights, "x"),
        (x, weights._replace(w2=weights.w2.T.contiguous().T), "w2"),
        (x, weights._replace(b1=weights.b1[:1].expand(33)), "b1"),
    ):
        with pytest.raises(ValueError, match=f"{name} .* has strides .* expected contiguous"):
            mlp(bad_x, bad_weights)
