"""Attention: exact where the softmax is, within its error bound on reals, blind to what lies outside."""

import pytest
import torch

from depthfuse.kernels import attention as module
from depthfuse.kernels.attention import AttentionConfig, attention
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])

# batch, tokens, heads, head dimension
CASES = {
    "two_heads": (2, 50, 2, 32),
    "many_keys": (1, 130, 1, 64),
    "one_token": (3, 1, 2, 32),
    "odd_head": (1, 17, 1, 40),
    "wide_head": (1, 20, 1, 128),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_bound(case, dtype, device):
    batch, tokens, heads, head_dim = case
    qkv = guarded(torch.randn(batch, tokens, 3 * heads * head_dim).to(device, dtype))
    assert_within(attention(qkv, heads=heads), *oracle.attention(qkv, heads, sums=torch.float32))


@pytest.mark.parametrize("interleave", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_keys_average_the_values_exactly(dtype, interleave, device):
    """With no scores to tell keys apart, 64 tokens average 64 integers: a wrong row or a missing one is a mismatch."""
    qkv = torch.zeros(2, 64, 3, 2, 32)
    qkv[:, :, 2] = torch.randint(-4, 5, (2, 64, 2, 32))
    qkv = guarded(qkv.flatten(2).to(device, dtype))
    config = AttentionConfig(64, 32, 4, 1, interleave)
    exact = qkv[..., 128:].double().mean(1, keepdim=True).expand(2, 64, 64)
    assert torch.equal(attention(qkv, heads=2, config=config), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_score_selects_its_key_exactly(dtype, device):
    """Query i matches key i by far: every output is one value row, whatever the order of the steps."""
    tokens = 48
    permutation = torch.randperm(tokens)
    qkv = torch.zeros(1, tokens, 3, 1, 64)
    qkv[0, torch.arange(tokens), 0, 0, permutation] = 64
    qkv[0, torch.arange(tokens), 1, 0, torch.arange(tokens)] = 64
    qkv[:, :, 2] = torch.randint(-8, 9, (1, tokens, 1, 64))
    qkv = guarded(qkv.flatten(2).to(device, dtype))
    assert torch.equal(attention(qkv, heads=1, scale=1.0), qkv[:, permutation.to(device), 128:])


def test_64_bit_offsets_and_repeated_runs_give_the_same_bits(device, monkeypatch):
    qkv = torch.randn(2, 50, 192).to(device, torch.float16)
    first = attention(qkv, heads=2)
    assert torch.equal(attention(qkv, heads=2), first)
    monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(attention(qkv, heads=2), first)


def test_empty_batch(device):
    assert attention(torch.zeros(0, 7, 192, device=device), heads=2).shape == (0, 7, 64)


def test_a_bad_layout_is_named(device):
    qkv = torch.zeros(50, 2, 192, device=device).transpose(0, 1)
    with pytest.raises(ValueError, match=r"qkv \[2, 50, 192\] has strides .* expected contiguous"):
        attention(qkv, heads=2)
