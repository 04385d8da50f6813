"""`depthfuse.ops.attention` on a CPU: values, layouts, errors, FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.ops import attention
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# batch, tokens, heads, head dimension
CASES = {"odd": (2, 7, 3, 5), "one_token": (3, 1, 2, 8), "one_head": (1, 17, 1, 64), "usual": (1, 33, 2, 32)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_bound(case, scale, dtype):
    batch, tokens, heads, dim = case
    qkv = torch.randn(batch, tokens, 3 * heads * dim).to(dtype)
    y = attention(qkv, heads, scale=scale)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_within(y, *oracle.attention(qkv, heads, scale))


def test_one_hot_queries_fetch_their_value():
    """Scores far apart make the softmax a choice: any mixed-up head, token or part is a plain mismatch."""
    tokens, heads, dim = 6, 3, 8
    order = torch.randperm(tokens)
    qkv = torch.zeros(1, tokens, 3, heads, dim)
    qkv[0, :, 1] = F.one_hot(torch.arange(tokens), dim).unsqueeze(1)  # key of token m: the m-th axis
    qkv[0, :, 0] = qkv[0, order, 1] * 1e4  # the query of token n asks for token order[n]
    qkv[0, :, 2] = torch.arange(tokens * heads * dim).view(tokens, heads, dim)
    y = attention(qkv.flatten(2), heads)
    assert torch.equal(y.view(tokens, heads, dim), qkv[0, order, 2])


def test_any_layout():
    qkv = torch.randn(2, 7, 24)
    for other in (
        qkv.transpose(0, 1).contiguous().transpose(0, 1),
        torch.randn(2, 7, 48)[..., ::2].copy_(qkv),
    ):
        y = attention(other, 2)
        assert y.is_contiguous()
        assert_within(y, *oracle.attention(qkv, 2))


BAD = {
    "two axes": (ValueError, {"qkv": torch.zeros(7, 24)}, ["qkv", "[7, 24]", "[B, N, 3 * heads * D]"]),
    "width": (ValueError, {"qkv": torch.zeros(2, 7, 25)}, ["qkv", "[2, 7, 25]", "heads 2"]),
    "no channels": (ValueError, {"qkv": torch.zeros(2, 7, 0)}, ["qkv", "[2, 7, 0]", "heads 2"]),
    "heads do not divide": (ValueError, {"heads": 5}, ["qkv", "[2, 7, 24]", "heads 5"]),
    "no heads": (ValueError, {"heads": 0}, ["heads", "0", "at least 1"]),
    "integers": (TypeError, {"qkv": torch.zeros(2, 7, 24).int()}, ["qkv", "torch.int32", "floating-point"]),
    "backend": (ValueError, {"backend": "cuda"}, ["'cuda'", "auto", "triton", "reference"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    kind, change, words = BAD[case]
    with pytest.raises(kind) as caught:
        attention(**{"qkv": torch.zeros(2, 7, 24), "heads": 2, **change})
    for word in words:
        assert word in str(caught.value)


def test_flops_as_two_products():
    batch, tokens, heads, dim = 2, 7, 3, 8
    with FlopCounterMode(display=False) as fused:
        attention(torch.randn(batch, tokens, 3 * heads * dim), heads)
    with FlopCounterMode(display=False) as plain:
        q = torch.randn(batch * heads, tokens, dim)
        torch.bmm(torch.bmm(q, q.transpose(1, 2)), q)
    assert fused.get_total_flops() == plain.get_total_flops() > 0
