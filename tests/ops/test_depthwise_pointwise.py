"""`depthfuse.ops.depthwise_pointwise` on a CPU: values, errors, FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.ops import depthwise_pointwise
from tests.ops.formula import ACT, EXACT_ACTS

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
