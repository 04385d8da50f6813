"""Linear layer: exact on integers, within its error bound on reals, blind to what lies outside."""

import pytest
import torch

from depthfuse.kernels.arguments import Tail
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.kernels.linear import linear
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])

# leading shape of x, channels, outputs
CASES = {
    "tokens": ((2, 37), 192, 70),
    "one_row": ((1,), 48, 33),
    "vector": ((), 16, 8),
    "odd_depth": ((65,), 27, 32),
    "one_channel": ((5,), 1, 1),
    "deep": ((3,), 320, 40),
    "four_dims": ((2, 3, 5), 24, 144),
}


def operands(case, dtype, device, integers):
    leading, c, k = case

    def sample(*shape):
        return (torch.randint(-3, 4, shape) if integers else torch.randn(shape)).to(device, dtype)

    return [
        guarded(t)
        for t in (sample(*leading, c), sample(k, c), sample(k), sample(*leading, k), sample(k), sample(k))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, weight, *tail = operands(case, dtype, device, integers=True)
    expected = oracle.linear(x, weight, Tail(*tail, "relu")).value.to(dtype)
    assert torch.equal(linear(x, weight, Tail(*tail, "relu")), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACT)
def test_error_bound(act, dtype, device):
    x, weight, *tail = operands(CASES["tokens"], dtype, device, integers=False)
    tail = Tail(*tail, act)
    assert_within(linear(x, weight, tail), *oracle.linear(x, weight, tail, sums=torch.float32))


def test_rows_further_apart(device):
    """The class token of a batch of token sequences is such a matrix."""
    x, weight, bias, *_ = operands(CASES["tokens"], torch.float16, device, integers=True)
    assert not x[:, 0].is_contiguous()
    assert torch.equal(linear(x[:, 0], weight, Tail(bias)), linear(x[:, 0].contiguous(), weight, Tail(bias)))


def test_empty_batch(device):
    x, weight, *_ = operands(CASES["tokens"], torch.float16, device, integers=True)
    assert linear(x[:0], weight).shape == (0, 37, 70)


def test_same_bits_from_run_to_run(device):
    x, weight, *tail = operands(CASES["deep"], torch.float16, device, integers=False)
    first = linear(x, weight, Tail(*tail, "gelu"))
    assert all(torch.equal(linear(x, weight, Tail(*tail, "gelu")), first) for _ in range(3))


def test_transposed_input_is_named(device):
    x = torch.zeros(4, 3, device=device).T
    with pytest.raises(ValueError, match=r"x \[3, 4\] has strides \[1, 3\], expected contiguous"):
        linear(x, torch.zeros(6, 4, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 100])
def test_layer_norm_before_the_product(dtype, offset, device):
    """`offset`: a mean far from zero must not cancel the variance away."""
    x, weight, *tail = operands(CASES["tokens"], dtype, device, integers=False)
    x = x + offset
    tail = Tail(*tail, "gelu")
    y = linear(x, weight, tail, norm_eps=1e-6)
    assert_within(y, *oracle.linear(x, weight, tail, 1e-6, sums=torch.float32))


def test_layer_norm_of_a_constant_row_is_zero(device):
    x = torch.full((3, 48), 7.0, device=device)
    weight, bias = torch.ones(8, 48, device=device), torch.arange(8.0, device=device)
    assert torch.equal(linear(x, weight, Tail(bias), norm_eps=1e-6), bias.expand(3, 8))
