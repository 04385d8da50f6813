"""`depthwise_pointwise`, `pool_linear` and `winograd_conv2d` on a CPU: values, errors, FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.ops import conv2d, depthwise_pointwise, pool_linear, winograd_conv2d
from tests.ops.formula import ACT, EXACT_ACTS

pytest.importorskip("triton", reason="weights are packed by functions that stand beside the Triton kernels")
from depthfuse.kernels.winograd import pack_weight

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sparse(*shape, dtype=torch.float32):
    """Few ones and minus ones: sums stay exact in bfloat16 too."""
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).to(dtype)


def finish(z, bias, residual, scale, shift, act):
    wide = (-1, 1, 1)
    z = ACT[act](z + bias.double().view(wide) + residual.double())
    return z * scale.double().view(wide) + shift.double().view(wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
def test_depthwise_pointwise(act, dtype):
    x, w1, b1 = sparse(2, 6, 7, 5, dtype=dtype), sparse(6, 1, 5, 3, dtype=dtype), sparse(6, dtype=dtype)
    w2, geometry = sparse(9, 6, 1, 1, dtype=dtype), {"stride": (2, 1), "padding": (2, 1)}
    z = ACT["relu"](F.conv2d(x.double(), w1.double(), b1.double(), groups=6, **geometry))
    z = F.conv2d(z, w2.double())
    tail = [sparse(*shape, dtype=dtype) for shape in ((9,), z.shape, (9,), (9,))]
    y = depthwise_pointwise(x, w1, b1, w2, *tail, **geometry, act_inner="relu", act=act)
    assert y.dtype == dtype
    assert torch.equal(y.double(), finish(z, *tail, act))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
def test_winograd_conv2d(act, dtype):
    x, weight = sparse(2, 6, 5, 4, dtype=dtype), 4 * sparse(9, 6, 3, 3, dtype=dtype)
    tail = [sparse(*shape, dtype=dtype) for shape in ((9,), (2, 9, 7, 4), (9,), (9,))]
    y = winograd_conv2d(x, pack_weight(weight), *tail, padding=(2, 1), act=act)
    z = F.conv2d(x.double(), weight.double(), padding=(2, 1))
    assert torch.equal(y.double(), finish(z, *tail, act))


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


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_are_those_of_the_layers():
    x, w1, w2 = sparse(2, 6, 8, 8), sparse(6, 1, 3, 3), sparse(9, 6, 1, 1)
    both = 2 * 2 * 64 * (6 * 9 + 6 * 9)
    assert flops(lambda: depthwise_pointwise(x, w1, None, w2, padding=1)) == both
    assert flops(lambda: pool_linear(x, sparse(5, 6))) == 2 * 2 * 6 * 5
    weight = sparse(9, 6, 3, 3)
    direct = flops(lambda: conv2d(x, weight, padding=1))
    packed = pack_weight(weight)
    assert flops(lambda: winograd_conv2d(x, packed)) == direct


X, W1, W2 = sparse(1, 6, 5, 5), sparse(6, 1, 3, 3), sparse(9, 6, 1, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: depthwise_pointwise(X, sparse(5, 1, 3, 3), None, W2),
            ValueError,
            r"w1 has shape \[5, 1, 3, 3\], expected \[6, 1, 3, 3\] \(x has 6 channels\)",
        ),
        (
            lambda: depthwise_pointwise(X, W1, None, sparse(9, 5, 1, 1)),
            ValueError,
            r"w2 has shape \[9, 5, 1, 1\], expected \[9, 6, 1, 1\]",
        ),
        (
            lambda: depthwise_pointwise(X, W1, None, W2.half()),
            TypeError,
            "w2 has dtype torch.float16, expected x's dtype torch.float32",
        ),
        (
            lambda: depthwise_pointwise(X, sparse(6, 1, 7, 7), None, W2),
            ValueError,
            r"depthwise_pointwise: x of \[1, 6, 5, 5\] is smaller than the kernel \[7, 7\]",
        ),
        (lambda: depthwise_pointwise(X, W1, None, W2, act_inner="tanh"), ValueError, "unknown act 'tanh'"),
        (lambda: depthwise_pointwise(X[0], W1, None, W2), ValueError, r"expected \[N, C, H, W\]"),
        (
            lambda: winograd_conv2d(X, W2),
            ValueError,
            r"packed has shape \[9, 6, 1, 1\], expected \[16, K, C\] from pack_weight",
        ),
        (
            lambda: winograd_conv2d(X, sparse(16, 9, 5)),
            ValueError,
            r"packed has shape \[16, 9, 5\], expected \[16, 9, 6\]",
        ),
        (
            lambda: winograd_conv2d(sparse(1, 6, 2, 5), sparse(16, 9, 6), padding=0),
            ValueError,
            "smaller than the kernel",
        ),
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
