"""Softmax attention on the output of a qkv projection: the op `depthfuse::attention`.

    y[b, n, h] = softmax_m(q[b, n, h] . k[b, m, h] * scale) v[b, m, h]

It takes [B, N, 3 * heads * D] as the qkv projection writes it, and gives [B, N, heads * D] as the output projection
reads it, so that nothing is transposed between the three. See `depthfuse.ops.conv2d` for the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.ops.backend import product_refusal
from depthfuse.ops.checks import check_channels, check_same_kind, shape_text
from depthfuse.ops.declare import declare
from depthfuse.ops.layouts import ROWS


def attention(
    qkv: Tensor,  # [B, N, 3 * heads * D]: queries, keys, values, each heads x D
    heads: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T scale) v for every head, without mask, dropout or autograd.

    Args:
        qkv: [B, N, 3 * heads * D], any strides; B may be 0.
        heads: how many; each has D channels.
        scale: of the scores; None is 1 / sqrt(D).
        backend: "auto", "triton" or "reference". The kernel takes at most 1024 tokens N and heads of D = 32 to 128;
            for others "auto" takes the reference, which is PyTorch's scaled_dot_product_attention.

    Returns:
        [B, N, heads * D], contiguous.

    Raises:
        ValueError: a shape that does not fit, or an unknown backend. TypeError: a dtype that is not floating point.
        BackendError.
    """
    return torch.ops.depthfuse.attention(qkv, heads, scale, backend)


def attention_reference(qkv: Tensor, heads: int, scale: float | None) -> Tensor:
    """The op in plain PyTorch: oracle, baseline, and what runs where no kernel does."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def check_arguments(qkv: Tensor, heads: int, scale: float | None = None) -> list[int]:
    """Check everything that `attention` promises to check; returns the output's shape."""
    check_same_kind("attention", qkv, {}, first="qkv")
    if heads < 1:
        raise ValueError(f"attention: heads is {heads}, expected at least 1")
    if qkv.dim() != 3 or qkv.shape[2] % (3 * heads) or qkv.shape[2] == 0:
        raise ValueError(
            f"attention: qkv has shape {shape_text(qkv.shape)}, expected [B, N, 3 * heads * D] with heads {heads}"
        )
    check_channels("attention", qkv=qkv.shape[2])
    return [qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3]


def refusal(qkv: Tensor, heads: int, scale: float | None) -> str | None:
    """What the kernel does not take of a call, in words, or None."""
    from depthfuse.kernels.attention import supports

    size = (qkv.shape[1], qkv.shape[2] // (3 * heads))
    return product_refusal(qkv.dtype) if supports(*size) else "{} tokens with heads of {}".format(*size)


def _triton(qkv: Tensor, heads: int, scale: float | None) -> Tensor:
    from depthfuse.kernels.attention import attention as triton_attention

    return triton_attention(qkv.contiguous(), heads=heads, scale=scale)


def _flops(qkv_shape, heads, *args, out_shape=None, **kwargs) -> int:
    batch, tokens, width = out_shape
    return 4 * batch * tokens * tokens * width  # two products of N x N x D a head


declare(
    "attention(Tensor qkv, SymInt heads, float? scale, str backend) -> Tensor",
    values={},
    layout=ROWS,
    check=check_arguments,
    refusal=refusal,
    reference=attention_reference,
    triton=_triton,
    flops=_flops,
)
