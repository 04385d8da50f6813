"""Fused MLP: exact on integers, within its error bound on reals, blind to what lies outside."""

import pytest
import torch
import torch.nn.functional as F

from depthfuse.kernels.launch import INTERPRETED
from depthfuse.kernels.mlp import mlp
from tests.kernels.oracle import ACTIVATIONS, STEEPEST, assert_within, finish, forward_error, guarded

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
    inner = [guarded(t) for t in (sample(hidden, c), sample(hidden), sample(k, hidden))]
    return x, inner, [guarded(t) for t in (sample(k), sample(*leading, k), sample(k), sample(k))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, (w1, b1, w2), tail = operands(case, dtype, device, integers=True)
    y = mlp(x, w1, b1, w2, *tail, act_inner="relu", act="relu")
    hidden = torch.relu(F.linear(x.double(), w1.double(), b1.double()))
    assert torch.equal(y, finish(hidden @ w2.double().T, *tail, "relu", channel_dim=-1).to(dtype))


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound(dtype, norm_eps, act, device):
    x, (w1, b1, w2), tail = operands(CASES["tokens"], dtype, device, integers=False)
    y = mlp(x, w1, b1, w2, *tail, act_inner=act, norm_eps=norm_eps)
    value = x.double() if norm_eps is None else F.layer_norm(x.double(), x.shape[-1:], eps=norm_eps)
    hidden = ACTIVATIONS[act](F.linear(value, w1.double(), b1.double()))
    exact = finish(hidden @ w2.double().T, *tail, "none", channel_dim=-1)
    inner = F.linear(value.abs(), w1.double().abs(), b1.double().abs())
    magnitude = inner @ w2.double().abs().T
    bound = forward_error(sum(w1.shape), 3 * magnitude, exact, *tail, dtype, channel_dim=-1)
    # Two roundings to the dtype lie inside: of the normalised rows, and of the hidden step.
    rounding = (STEEPEST + 1) * torch.finfo(dtype).eps * magnitude
    assert_within(y, exact, bound + rounding * tail[2].double().abs())


def test_empty_batch_and_no_tail(device):
    x, (w1, _, w2), _ = operands(CASES["odd"], torch.float16, device, integers=True)
    assert mlp(x[:0], w1, None, w2).shape == (0, 40)
    exact = torch.relu(x.double() @ w1.double().T) @ w2.double().T
    assert torch.equal(mlp(x, w1, None, w2, act_inner="relu"), exact.to(x.dtype))


@pytest.mark.parametrize(
    ("x", "w1", "w2", "message"),
    [
        ((3, 8), (16, 9), (8, 16), "do not fit"),
        ((3, 8), (16, 8), (8, 15), "do not fit"),
        ((3, 300), (16, 300), (8, 16), "300 -> 8 channels: expected at most 256"),
    ],
)
def test_bad_input_is_named(x, w1, w2, message, device):
    x, w1, w2 = (torch.zeros(shape, device=device) for shape in (x, w1, w2))
    with pytest.raises(ValueError, match=message):
        mlp(x, w1, None, w2)
