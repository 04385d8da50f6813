"""`depthfuse.ops.depthwise_pointwise` on a CPU: values, errors, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.kernels.arguments import Tail, TwoLayers, Window
from depthfuse.ops import depthwise_pointwise
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import EXACT_ACTS, assert_within

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sparse(*shape, dtype=torch.float32):
    """Few ones and minus ones: sums stay exact in bfloat16 too."""
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
def test_depthwise_pointwise(act, dtype):
    x, w1, b1 = sparse(2, 6, 7, 5, dtype=dtype), sparse(6, 1, 5, 3, dtype=dtype), sparse(6, dtype=dtype)
    weights, window = TwoLayers(w1, b1, sparse(9, 6, 1, 1, dtype=dtype)), Window((2, 1), (2, 1))
    shape = (2, 9, *window.output_size((7, 5), (5, 3)))
    tail = [sparse(*shape, dtype=dtype) for shape in ((9,), shape, (9,), (9,))]
    geometry = {"stride": window.stride, "padding": window.padding}
    y = depthwise_pointwise(x, *weights, *tail, **geometry, act_inner="relu", act=act)
    assert y.dtype == dtype
    exact = oracle.depthwise_pointwise(x, weights, Tail(*tail, act), window, "relu").value
    assert torch.equal(y.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_inner", ["none", "gelu", "hardswish"])
def test_error_bound(act_inner, dtype):
    shapes = [(2, 6, 7, 5), (6, 1, 3, 3), (6,), (9, 6, 1, 1), (9,), (2, 9, 7, 5), (9,), (9,)]
    x, w1, b1, w2, *tail = (torch.randn(shape).to(dtype) for shape in shapes)
    y = depthwise_pointwise(x, w1, b1, w2, *tail, padding=1, act_inner=act_inner, act="silu")
    weights, window = TwoLayers(w1, b1, w2), Window(padding=(1, 1))
    assert_within(y, *oracle.depthwise_pointwise(x, weights, Tail(*tail, "silu"), window, act_inner))


def test_flops_are_those_of_both_layers():
    x, w1, w2 = sparse(2, 6, 8, 8), sparse(6, 1, 3, 3), sparse(9, 6, 1, 1)
    with FlopCounterMode(display=False) as counter:
        depthwise_pointwise(x, w1, None, w2, padding=1)
    assert counter.get_total_flops() == 2 * 2 * 64 * (6 * 9 + 6 * 9)


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
            lambda: depthwise_pointwise(X, W1, sparse(7), W2),
            ValueError,
            r"b1 has shape \[7\], expected \[6\] \(x has 6 channels\)",
        ),
        (
            lambda: depthwise_pointwise(X, sparse(6, 2, 3, 3), None, W2),
            ValueError,
            r"w1 has shape \[6, 2, 3, 3\], expected \[6, 1, 3, 3\]",
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
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
