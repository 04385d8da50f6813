"""`depthfuse.ops.pool_linear` on a CPU: values, errors, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.ops import pool_linear
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sparse(*shape, dtype=torch.float32):
    """Few ones and minus ones: sums stay exact in bfloat16 too."""
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-6, 1e-3])
def test_error_bound(norm_eps, dtype):
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((3, 20, 4, 5), (7, 20), (7,)))
    for given in (bias, None):
        y = pool_linear(x, weight, given, norm_eps=norm_eps)
        assert y.dtype == dtype
        assert_within(y, *oracle.pool_linear(x, weight, given, norm_eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_integers_are_exact(dtype):
    """The mean of 16 small integers is exact, and so is a sum of a few of them."""
    x, weight, bias = sparse(3, 20, 4, 4, dtype=dtype), sparse(7, 20, dtype=dtype), sparse(7, dtype=dtype)
    assert torch.equal(pool_linear(x, weight, bias).double(), oracle.pool_linear(x, weight, bias).value)


def test_flops_are_those_of_the_linear_layer():
    x, weight = sparse(2, 6, 8, 8), sparse(5, 6)
    with FlopCounterMode(display=False) as counter:
        pool_linear(x, weight)
    assert counter.get_total_flops() == 2 * 2 * 6 * 5


X = sparse(1, 6, 5, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pool_linear(X, sparse(4, 5)),
            ValueError,
            r"weight has shape \[4, 5\], expected \[4, 6\] \(x has 6 channels\)",
        ),
        (
            lambda: pool_linear(X, sparse(4, 6), sparse(5)),
            ValueError,
            r"bias has shape \[5\], expected \[4\]",
        ),
        (lambda: pool_linear(X[:, :, :0], sparse(4, 6)), ValueError, "expected at least one pixel"),
        (lambda: pool_linear(X.int(), sparse(4, 6)), TypeError, "x has dtype torch.int32"),
        (lambda: pool_linear(X, sparse(4, 6), norm_eps=-1.0), ValueError, "norm_eps is -1.0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
