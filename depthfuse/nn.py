"""Autograd-free modules that stand for whole conv or linear chains: bias, residual, activation, affine in one
call.

They hold buffers, not parameters. The plain weight is a buffer, so `state_dict` saves and rebuilds them and
`.to(...)` moves them; the copy that oneDNN packs for the CPU is derived from it, never saved, and dropped
whenever the plain weight changes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from depthfuse import ops
from depthfuse.ops import onednn
from depthfuse.ops.activations import ACTIVATIONS, activation
from depthfuse.ops.conv2d import check_arguments as check_conv2d
from depthfuse.ops.linear import check_arguments as check_linear

# oneDNN computes these as min and max, which turn NaN into a number; PyTorch's own propagate it.
SWALLOWS_NAN = frozenset({"relu", "relu6"})

_local = threading.local()


@contextlib.contextmanager
def propagate_nan() -> Iterator[None]:
    """Within it (in this thread) the fused modules run the plain ops, which propagate NaN through ReLU and
    ReLU6.
    """
    before = getattr(_local, "plain", False)
    _local.plain = True
    try:
        yield
    finally:
        _local.plain = before


class _Fused(nn.Module):
    """What the fused modules share: epilogue buffers, the packed weight's life, and the report's text."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, weight, bias, scale, shift, act: str, backend: str) -> None:
        super().__init__()
        activation(act)
        self.act = act
        self.backend = backend
        for name, value in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
            self.register_buffer(name, None if value is None else value.detach().clone())
        self._packed: Tensor | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module._drop_packed())
        self.eval()

    def _drop_packed(self) -> None:
        self._packed = None

    def _apply(self, fn, recurse: bool = True):
        self._drop_packed()
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {**super().__getstate__(), "_packed": None}  # opaque tensors can neither be copied nor saved

    def _can_pack(self) -> bool:
        name, _ = ops.resolve_backend(self.backend, self.weight.device)
        return (
            name == "reference" and self.weight.device.type == "cpu" and onednn.available(self.weight.dtype)
        )

    def _use_packed(self, x: Tensor) -> bool:
        return (
            self._packed is not None
            and x.numel() > 0
            and not getattr(_local, "plain", False)
            and not torch.compiler.is_compiling()
        )

    def _affine_(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """The affine after the activation, in place."""
        if self.scale is not None:
            scale = self.scale.view(shape)
            if self.shift is not None:
                return torch.addcmul(self.shift.view(shape), y, scale, out=y)
            return y.mul_(scale)
        return y if self.shift is None else y.add_(self.shift.view(shape))

    def implementation(self) -> str:
        """What runs this module, in words."""
        if self._packed is not None:
            return "oneDNN pre-packed"
        return ops.resolve_backend(self.backend, self.weight.device)[0]

    def epilogue(self) -> str:
        """What is fused behind the product, in words."""
        parts = ["bias"] if self.bias is not None else []
        parts += [self.act] if self.act != "none" else []
        parts += ["affine"] if self.scale is not None or self.shift is not None else []
        return " + ".join(parts) or "none"

    def extra_repr(self) -> str:
        return f"backend={self.implementation()!r}, epilogue={self.epilogue()!r}"


class FusedConv2d(_Fused):
    """scale * act(conv2d(x, weight) + bias + residual) + shift. Depthwise where groups equals the channels.

    Args:
        weight: [K, C / groups, R, S]. bias, scale, shift: [K] or None. All of one dtype, on one device.
        stride, padding, dilation: (height, width).
        act, backend: see `depthfuse.ops.conv2d`.

    Raises:
        ValueError, TypeError: see `depthfuse.ops.conv2d`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        act: str = "none",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            weight.contiguous(memory_format=torch.channels_last), bias, scale, shift, act, backend
        )
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, act: str = "none", scale=None, shift=None, backend="auto"
    ) -> FusedConv2d:
        """From an nn.Conv2d with zero padding given in numbers; the convolution is left alone."""
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"expected a convolution with zero padding in numbers, got {conv}")
        return cls(
            conv.weight,
            conv.bias,
            scale,
            shift,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            act=act,
            backend=backend,
        )

    def prepare(self, input_size: Sequence[int]) -> None:
        """Pack the weight for oneDNN, in the layout best for `input_size` [N, C, H, W]. No-op where it cannot
        run.
        """
        if self._can_pack():
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            self._packed = onednn.pack_conv2d(self.weight, input_size, *geometry)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; residual: [N, K, P, Q] or None. Returns [N, K, P, Q] in channels_last."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if self._use_packed(x):
            if (
                x.dim() != 4
                or x.dtype != self.weight.dtype
                or (residual is not None and residual.dtype != x.dtype)
            ):
                check_conv2d(x, self.weight, self.bias, residual, self.scale, self.shift, *geometry, self.act)
            y = onednn.conv2d(x, self._packed, self.bias, residual, *geometry, self.act)
            return self._affine_(y, (1, -1, 1, 1))
        return torch.ops.depthfuse.conv2d(
            x, self.weight, self.bias, residual, self.scale, self.shift, *geometry, self.act, self.backend
        )

    def extra_repr(self) -> str:
        filters, group_channels, *kernel = self.weight.shape
        return (
            f"{group_channels * self.groups}, {filters}, kernel_size={tuple(kernel)}, "
            f"stride={tuple(self.stride)}, padding={tuple(self.padding)}, "
            f"groups={self.groups}, {super().extra_repr()}"
        )


class FusedLinear(_Fused):
    """scale * act(x @ weight.T + bias + residual) + shift over the last axis.

    Args:
        weight: [K, C]. bias, scale, shift: [K] or None. All of one dtype, on one device.
        act, backend: see `depthfuse.ops.linear`.
    """

    def __init__(self, weight, bias=None, scale=None, shift=None, *, act="none", backend="auto") -> None:
        super().__init__(weight.contiguous(), bias, scale, shift, act, backend)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, act="none", scale=None, shift=None, backend="auto"
    ) -> FusedLinear:
        """From an nn.Linear, which is left alone."""
        return cls(linear.weight, linear.bias, scale, shift, act=act, backend=backend)

    def prepare(self, input_size: Sequence[int]) -> None:
        """Pack the weight for oneDNN, in the layout best for an input of `input_size` [..., C]."""
        if self._can_pack():
            rows = 1
            for size in input_size[:-1]:
                rows *= size
            self._packed = onednn.pack_linear(self.weight, rows)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [..., C]; residual: [..., K] or None. Returns [..., K]."""
        if self._use_packed(x):
            if x.dtype != self.weight.dtype or x.shape[-1] != self.weight.shape[1]:
                check_linear(x, self.weight, self.bias, residual, self.scale, self.shift, self.act)
            if residual is None or residual.shape[:-1] == x.shape[:-1]:
                y = onednn.linear(x, self._packed, self.bias, residual, self.act)
                return self._affine_(y, (-1,))
        return torch.ops.depthfuse.linear(
            x, self.weight, self.bias, residual, self.scale, self.shift, self.act, self.backend
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {super().extra_repr()}"


__all__ = ["ACTIVATIONS", "SWALLOWS_NAN", "FusedConv2d", "FusedLinear", "propagate_nan"]
