"""`depthfuse.ops.winograd_conv2d` on a CPU: values, errors, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.ops import conv2d, winograd_conv2d
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import EXACT_ACTS

pytest.importorskip("triton", reason="weights are packed by a function that stands beside the Triton kernel")
from depthfuse.kernels.winograd import pack_weight

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sparse(*shape, dtype=torch.float32):
    """Few ones and minus ones: sums stay exact in bfloat16 too."""
    return (torch.randint(-1, 2, shape) * (torch.rand(shape) < 0.3)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
def test_winograd_conv2d(act, dtype):
    x, weight = sparse(2, 6, 5, 4, dtype=dtype), 4 * sparse(9, 6, 3, 3, dtype=dtype)
    tail = [sparse(*shape, dtype=dtype) for shape in ((9,), (2, 9, 7, 4), (9,), (9,))]
    y = winograd_conv2d(x, pack_weight(weight), *tail, padding=(2, 1), act=act)
    exact = oracle.conv2d(x, weight, Tail(*tail, act), Window(padding=(2, 1))).value
    assert torch.equal(y.double(), exact)


def test_flops_are_those_of_the_direct_convolution():
    x, weight = sparse(2, 6, 8, 8), sparse(9, 6, 3, 3)
    packed, counts = pack_weight(weight), []
    for call in (lambda: conv2d(x, weight, padding=1), lambda: winograd_conv2d(x, packed)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 64 * 9 * 6 * 9


X, W2 = sparse(1, 6, 5, 5), sparse(9, 6, 1, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
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
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
