"""One operator at one shape: its operands, its launches, its cost, and the ways to compute it.

Every case has the same members, so that the prover, the microbenchmarks and their tests walk one list:
`operands`, `launches` (what ours would launch; meta tensors will do), `flops`, `bytes_moved`, `eager` and `ours`.
"""

from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from depthfuse import ops
from depthfuse.kernels.arguments import Tail, Window
from depthfuse.kernels.launch import Launch, Target, empty_image

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """An operator at a shape. `op` names the kernel; the fields of subclasses are the shape."""

    op = ""
    matrix = True  # whether matrix units do the arithmetic

    def shape(self) -> str:
        """The fields in words: "batch=128 channels=64 ..."."""
        return " ".join(f"{f.name}={v}" for f, v in zip(fields(self), astuple(self), strict=True))

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether our kernel takes this shape in `dtype`; elsewhere the op falls back."""
        return True

    def operands(self, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
        """Inputs of the operator, random, or shapes only on the "meta" device."""
        raise NotImplementedError

    def launches(self, dtype: torch.dtype, target: Target) -> list[Launch]:
        """What `ours` would launch on `target`, in order."""
        raise NotImplementedError

    def flops(self) -> float:
        raise NotImplementedError

    def elements_moved(self) -> float:
        """Elements that must be read or written at least once."""
        raise NotImplementedError

    def eager(self, **operands: Tensor | None) -> Tensor:
        """The operator in PyTorch's own functions: the op's reference, and a baseline."""
        raise NotImplementedError

    def ours(self, **operands: Tensor | None) -> Tensor:
        raise NotImplementedError


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal values, or none on the "meta" device."""
    return (
        torch.empty(shape, dtype=dtype, device=device)
        if device == "meta"
        else torch.randn(shape, dtype=dtype, device=device)
    )


COLOURS = 3  # a network's image, which comes channel by channel


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] stored as [N, H, W, C]."""
    return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Conv2dCase(Case):
    """Dense convolution. `affine`: scale and shift after the activation, as a merged block has them."""

    op = "conv2d"
    batch: int
    channels: int
    size: int  # height and width of the input
    out_channels: int
    kernel: int
    stride: int
    padding: int
    act: str = "none"
    residual: bool = False
    affine: bool = False

    def _window(self) -> Window:
        return Window((self.stride,) * 2, (self.padding,) * 2)

    def _out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def operands(self, dtype, device):
        k, out = self.out_channels, self._out_size()
        from depthfuse.kernels.conv2d import pack_weight

        weight = (k, 1 if self.op == "depthwise_conv2d" else self.channels, self.kernel, self.kernel)
        x = random((self.batch, self.channels, self.size, self.size), dtype, device)
        return {
            "x": x if self.channels == COLOURS else channels_last(x),
            "weight": pack_weight(random(weight, dtype, device)),
            "bias": random((k,), dtype, device),
            "residual": channels_last(random((self.batch, k, out, out), dtype, device))
            if self.residual
            else None,
            "scale": random((k,), dtype, device) if self.affine else None,
            "shift": random((k,), dtype, device) if self.affine else None,
        }

    def launches(self, dtype, target):
        from depthfuse.kernels import conv2d

        x, weight, *tail = self.operands(dtype, "meta").values()
        y = self._output(x)
        return [conv2d.plan(x, weight, Tail(*tail, self.act), y, self._window(), config=None, target=target)]

    def _output(self, x: Tensor) -> Tensor:
        return empty_image((self.batch, self.out_channels, self._out_size(), self._out_size()), x)

    def flops(self):
        return 2.0 * self.batch * self._out_size() ** 2 * self.out_channels * self.channels * self.kernel**2

    def elements_moved(self):
        pixels = self.batch * self._out_size() ** 2
        inputs = self.batch * self.channels * self.size**2
        if self.stride > self.kernel:  # a strided 1x1 skips pixels
            inputs = pixels * self.kernel**2 * self.channels
        weights = self.out_channels * self.channels * self.kernel**2
        return inputs + weights + pixels * self.out_channels * (2 if self.residual else 1)

    def eager(self, x, weight, bias, residual, scale, shift):
        tail = Tail(bias, residual, scale, shift, self.act)
        return ops.conv2d_reference(x, weight, tail, self._window())

    def ours(self, x, weight, bias, residual, scale, shift):
        from depthfuse.kernels.conv2d import conv2d

        return conv2d(x, weight, Tail(bias, residual, scale, shift, self.act), self._window())


@dataclass(frozen=True)
class WinogradCase(Conv2dCase):
    """A 3x3 convolution of stride 1, by Winograd's F(2x2, 3x3); its cost stays that of the direct product."""

    op = "winograd_conv2d"

    def operands(self, dtype, device):
        from depthfuse.kernels.winograd import pack_weight

        operands = super().operands(dtype, device)
        return operands | {"packed": pack_weight(operands["weight"])}

    def launches(self, dtype, target):
        from depthfuse.kernels import winograd

        x, _, *tail, packed = self.operands(dtype, "meta").values()
        options = {"config": None, "target": target}
        return [winograd.plan(x, packed, Tail(*tail, self.act), self._output(x), self._window(), **options)]

    def eager(self, x, weight, bias, residual, scale, shift, packed):
        return super().eager(x, weight, bias, residual, scale, shift)

    def ours(self, x, weight, bias, residual, scale, shift, packed):
        from depthfuse.kernels.winograd import winograd_conv2d

        return winograd_conv2d(x, packed, Tail(bias, residual, scale, shift, self.act), self._window())


@dataclass(frozen=True)
class DepthwiseCase(Conv2dCase):
    """Depthwise convolution; `out_channels` equals `channels`. `norm`: LayerNorm over channels after the bias."""

    op = "depthwise_conv2d"
    matrix = False
    norm: bool = False

    def operands(self, dtype, device):
        from depthfuse.kernels.depthwise import pack_weight

        operands = super().operands(dtype, device)
        return operands | {"weight": pack_weight(operands["weight"])}

    def launches(self, dtype, target):
        from depthfuse.kernels import depthwise

        x, weight, *tail = self.operands(dtype, "meta").values()
        options = {"norm_eps": self._norm_eps(), "config": None, "target": target}
        return [depthwise.plan(x, weight, Tail(*tail, self.act), self._output(x), self._window(), **options)]

    def _norm_eps(self) -> float | None:
        return NORM_EPS if self.norm else None

    def flops(self):
        return super().flops() / self.channels

    def elements_moved(self):
        pixels = self.batch * self._out_size() ** 2
        weights = self.channels * self.kernel**2
        return self.channels * (self.batch * self.size**2 + pixels * (2 if self.residual else 1)) + weights

    def eager(self, x, weight, bias, residual, scale, shift):
        tail, window = Tail(bias, residual, scale, shift, self.act), self._window()
        return ops.conv2d_reference(x, weight, tail, window._replace(groups=self.channels), self._norm_eps())

    def ours(self, x, weight, bias, residual, scale, shift):
        from depthfuse.kernels.depthwise import depthwise_conv2d

        tail = Tail(bias, residual, scale, shift, self.act)
        return depthwise_conv2d(x, weight, tail, self._window(), norm_eps=self._norm_eps())


@dataclass(frozen=True)
class LinearCase(Case):
    """Linear layer over `rows` tokens; `norm`: after LayerNorm without affine."""

    op = "linear"
    rows: int
    channels: int
    out_channels: int
    act: str = "none"
    residual: bool = False
    affine: bool = False
    norm: bool = False

    def operands(self, dtype, device):
        k = self.out_channels
        return {
            "x": random((self.rows, self.channels), dtype, device),
            "weight": random((k, self.channels), dtype, device),
            "bias": random((k,), dtype, device),
            "residual": random((self.rows, k), dtype, device) if self.residual else None,
            "scale": random((k,), dtype, device) if self.affine else None,
            "shift": random((k,), dtype, device) if self.affine else None,
        }

    def launches(self, dtype, target):
        from depthfuse.kernels import linear

        x, weight, *tail = self.operands(dtype, "meta").values()
        y = torch.empty(self.rows, self.out_channels, dtype=dtype, device="meta")
        options = {"norm_eps": self._norm_eps(), "config": None, "target": target}
        return [linear.plan(x, weight, Tail(*tail, self.act), y, **options)]

    def _norm_eps(self) -> float | None:
        return NORM_EPS if self.norm else None

    def flops(self):
        return 2.0 * self.rows * self.channels * self.out_channels

    def elements_moved(self):
        outputs = self.rows * self.out_channels * (2 if self.residual else 1)
        return self.rows * self.channels + self.channels * self.out_channels + outputs

    def eager(self, x, weight, bias, residual, scale, shift):
        return ops.linear_reference(x, weight, Tail(bias, residual, scale, shift, self.act), self._norm_eps())

    def ours(self, x, weight, bias, residual, scale, shift):
        from depthfuse.kernels.linear import linear

        return linear(x, weight, Tail(bias, residual, scale, shift, self.act), norm_eps=self._norm_eps())
