"""CPU implementations of the fused ops, each bound to its weights once and then called often.

    plain    PyTorch's own ops one after another: what `depthfuse::conv2d` and `depthfuse::linear` run
    onednn   oneDNN with pre-packed weights and fused post-ops (60 us of overhead a call, measured on Zen 3)
    gemm     the BLAS that PyTorch was built with, then residual, activation and affine in place (10 us)
    bmm      attention as two batched products and a softmax, with the scores of all heads written down between them

Which is fastest depends on the shape, the processor and its BLAS, so `depthfuse.accelerate` measures. They differ in
one more thing: oneDNN's ReLU and ReLU6 turn NaN into a number (`SWALLOWS_NAN`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.ops import onednn
from depthfuse.ops.activations import activation

# oneDNN computes these as min and max, which drop NaN; PyTorch's own propagate it.
SWALLOWS_NAN = frozenset({"relu", "relu6"})

# (x, residual or None) -> y
Runner = Callable[[Tensor, Tensor | None], Tensor]


def _affine_(tail: Tail, shape: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """The tail's affine as an in-place function of tensors to which vectors of `shape` broadcast; None for none."""
    scale = None if tail.scale is None else tail.scale.view(shape)
    shift = None if tail.shift is None else tail.shift.view(shape)
    if scale is None:
        return None if shift is None else lambda y: y.add_(shift)
    if shift is None:
        return lambda y: y.mul_(scale)
    return lambda y: torch.addcmul(shift, y, scale, out=y)


def _rest_(tail: Tail) -> Runner:
    """Residual, activation and affine in place, channels on the last axis."""
    act = None if tail.act == "none" else activation(tail.act).apply_
    affine_ = _affine_(tail, (-1,))

    def run(y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y.add_(residual)
        if act is not None:
            act(y)
        return y if affine_ is None else affine_(y)

    return run


def conv2d_candidates(weight: Tensor, padding: Sequence[int], groups: int) -> list[str]:
    """The names of the implementations that can run a convolution here, the usual best first."""
    names = ["onednn"] if onednn.available(weight.dtype) else []
    if tuple(weight.shape[2:]) == (1, 1) and groups == 1 and not any(padding):
        names.append("gemm")
    return [*names, "plain"]


def linear_candidates(weight: Tensor) -> list[str]:
    """The names of the implementations that can run a linear layer here, the usual best first."""
    fused = ["onednn"] if onednn.available(weight.dtype) else []
    # Reduced precision pays only through oneDNN's dot-product instructions; in float32 the BLAS is hard to beat.
    return [*fused, "gemm"] if weight.dtype in (torch.bfloat16, torch.float16) else ["gemm", *fused]


def bind_conv2d(
    name: str,
    weight: Tensor,  # [K, C / groups, R, S]
    tail: Tail,  # without the residual, which each call brings
    window: Window,
    input_size: Sequence[
        int
    ],  # N, C, H, W: the layout of packed weights suits it, and is right for any other
) -> Runner:
    """The implementation `name` ("onednn" or "gemm") with the weights bound to it."""
    if name == "gemm":
        return _bind_pointwise(weight, tail, window.stride)
    stride, padding, dilation = list(window.stride), list(window.padding), list(window.dilation)
    groups = window.groups
    packed = onednn.pack_conv2d(weight, input_size, stride, padding, dilation, groups)
    bias, act, affine_ = tail.bias, tail.act, _affine_(tail, (1, -1, 1, 1))

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        y = onednn.conv2d(x, packed, bias, residual, stride, padding, dilation, groups, act)
        return y if affine_ is None else affine_(y)

    return run


def _bind_pointwise(weight: Tensor, tail: Tail, stride: Sequence[int]) -> Runner:
    matrix = weight.detach().reshape(weight.shape[:2])
    bias, rest_ = tail.bias, _rest_(tail)
    step_h, step_w = stride

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        if step_h > 1 or step_w > 1:
            x = x[:, :, ::step_h, ::step_w]
        y = F.linear(x.permute(0, 2, 3, 1), matrix, bias)
        return rest_(y, None if residual is None else residual.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return run


def bind_linear(name: str, weight: Tensor, tail: Tail, input_size: Sequence[int]) -> Runner:
    """The implementation `name` ("onednn" or "gemm") with the weights bound to it; input_size is [..., C]."""
    bias, act = tail.bias, tail.act
    if name == "gemm":
        rest_ = _rest_(tail)
        return lambda x, residual: rest_(F.linear(x, weight, bias), residual)
    rows = 1
    for size in input_size[:-1]:
        rows *= size
    packed = onednn.pack_linear(weight, rows)
    affine_ = _affine_(tail, (-1,))

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        y = onednn.linear(x, packed, bias, residual, act)
        return y if affine_ is None else affine_(y)

    return run


def attention_candidates(dtype: torch.dtype) -> list[str]:
    """The names of the implementations that can run attention here, the usual best first.

    PyTorch's flash attention makes many small products; in reduced precision few large ones are faster.
    """
    return ["bmm", "plain"] if dtype in (torch.bfloat16, torch.float16) else ["plain", "bmm"]


def bind_attention(name: str, heads: int, scale: float | None) -> Callable[[Tensor], Tensor] | None:
    """The implementation `name` as a function of qkv [B, N, 3 * heads * D]; None for "plain"."""
    if name != "bmm":
        return None

    def run(qkv: Tensor) -> Tensor:
        batch, tokens, width = qkv.shape
        dim = width // (3 * heads)
        parts = qkv.reshape(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).reshape(3, -1, tokens, dim)
        q, k, v = parts.unbind(0)
        alpha = dim**-0.5 if scale is None else scale
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=alpha)
        y = torch.bmm(torch.softmax(scores, -1), v)
        return y.view(batch, heads, tokens, dim).transpose(1, 2).reshape(batch, tokens, heads * dim)

    return run
