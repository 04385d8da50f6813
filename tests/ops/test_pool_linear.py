"""`depthfuse.ops.pool_linear` on a CPU: values, errors, FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.ops import pool_linear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sparse(*shape, dtype=torch.float32):
    """Few ones and minus ones: sums stay exact in bfloat16 too."""
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_linear(dtype):
    x, weight, bias = sparse(3, 20, 4, 4, dtype=dtype), sparse(7, 20, dtype=dtype), sparse(7, dtype=dtype)
    exact = F.linear(x.double().mean((2, 3)), weight.double(), bias.double())
    # A mean of 16 integers is exact in every dtype; so is a sum of few of them, but for bfloat16's 8 bits.
    eps = torch.finfo(dtype).eps
    assert ((pool_linear(x, weight, bias).double() - exact).abs() <= eps * exact.abs()).all()


@pytest.mark.parametrize("norm_eps", [1e-6, 1e-3])
def test_pool_linear_with_norm(norm_eps):
    x, weight = torch.randn(3, 20, 4, 5, dtype=torch.float64), torch.randn(7, 20, dtype=torch.float64)
    exact = F.layer_norm(x.mean((2, 3)), (20,), eps=norm_eps) @ weight.T
    torch.testing.assert_close(pool_linear(x, weight, norm_eps=norm_eps), exact, rtol=1e-12, atol=1e-12)


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
        (lambda: pool_linear(X[:, :, :0], sparse(4, 6)), ValueError, "expected at least one pixel"),
        (lambda: pool_linear(X.int(), sparse(4, 6)), TypeError, "x has dtype torch.int32"),
        (lambda: pool_linear(X, sparse(4, 6), norm_eps=-1.0), ValueError, "norm_eps is -1.0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
