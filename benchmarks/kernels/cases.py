"""One operator at one shape: its operands, its launches, its cost, and the ways to compute it.

Every case has the same members, so that the prover, the microbenchmarks and their tests walk one list:
`operands`, `launches` (what ours would launch; meta tensors will do), `flops`, `bytes_moved`, `eager` and `ours`.
"""

from dataclasses import astuple, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from depthfuse.kernels.launch import Launch, Target, empty_image, output_shape

NORM_EPS = 1e-6
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


@dataclass(frozen=True)
class Case:
    """An operator at a shape. `op` names the kernel; the fields of subclasses are the shape."""

    op = ""
    matrix = True  # whether matrix units do the arithmetic

    def shape(self) -> str:
        """The fields in words: "batch=128 channels=64 ..."."""
        return " ".join(f"{f.name}={v}" for f, v in zip(fields(self), astuple(self), strict=True))

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
        """The operator in PyTorch's own functions: oracle and baseline."""
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


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] stored as [N, H, W, C]."""
    return x.contiguous(memory_format=torch.channels_last)


def tail(z: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str) -> Tensor:
    """scale * act(z + residual) + shift over channels in dimension 1 (images) or last (tokens)."""
    z = ACTIVATIONS[act](z if residual is None else z + residual)
    if scale is None:
        return z
    wide = (-1, 1, 1) if z.dim() == 4 else (-1,)
    return z * scale.view(wide) + shift.view(wide)


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

    def _arguments(self) -> dict:
        return {"stride": (self.stride,) * 2, "padding": (self.padding,) * 2, "dilation": (1, 1)}

    def _out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def operands(self, dtype, device):
        k, out = self.out_channels, self._out_size()
        from depthfuse.kernels.conv2d import pack_weight

        weight = (k, 1 if self.op == "depthwise_conv2d" else self.channels, self.kernel, self.kernel)
        x = (self.batch, self.channels, self.size, self.size)
        return {
            "x": channels_last(random(x, dtype, device)),
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

        o = self.operands(dtype, "meta")
        arguments = self._arguments()
        y = empty_image(output_shape(o["x"], o["weight"], *arguments.values(), groups=1), o["x"])
        return conv2d.plan(*o.values(), y, **arguments, groups=1, act=self.act, config=None, target=target)

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
        return tail(F.conv2d(x, weight, bias, self.stride, self.padding), residual, scale, shift, self.act)

    def ours(self, x, weight, bias, residual, scale, shift):
        from depthfuse.kernels.conv2d import conv2d

        return conv2d(x, weight, bias, residual, scale, shift, **self._arguments(), groups=1, act=self.act)


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

        o = self.operands(dtype, "meta")
        shape = (self.batch, self.out_channels, self._out_size(), self._out_size())
        tail = [o[name] for name in ("bias", "residual", "scale", "shift")]
        options = {"padding": (self.padding,) * 2, "act": self.act, "config": None, "target": target}
        return [winograd.plan(o["x"], o["packed"], *tail, empty_image(shape, o["x"]), **options)]

    def eager(self, x, weight, bias, residual, scale, shift, packed):
        return super().eager(x, weight, bias, residual, scale, shift)

    def ours(self, x, weight, bias, residual, scale, shift, packed):
        from depthfuse.kernels.winograd import winograd_conv2d

        options = {"padding": (self.padding,) * 2, "act": self.act}
        return winograd_conv2d(x, packed, bias, residual, scale, shift, **options)


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

        o = self.operands(dtype, "meta")
        arguments = self._arguments()
        y = empty_image(output_shape(o["x"], o["weight"], *arguments.values(), groups=self.channels), o["x"])
        norm = {"norm_eps": NORM_EPS if self.norm else None}
        return [depthwise.plan(*o.values(), y, **arguments, act=self.act, **norm, config=None, target=target)]

    def flops(self):
        return super().flops() / self.channels

    def elements_moved(self):
        pixels = self.batch * self._out_size() ** 2
        weights = self.channels * self.kernel**2
        return self.channels * (self.batch * self.size**2 + pixels * (2 if self.residual else 1)) + weights

    def eager(self, x, weight, bias, residual, scale, shift):
        z = F.conv2d(x, weight, bias, self.stride, self.padding, groups=self.channels)
        if self.norm:
            z = F.layer_norm(z.permute(0, 2, 3, 1), (self.channels,), eps=NORM_EPS).permute(0, 3, 1, 2)
        return tail(z, residual, scale, shift, self.act)

    def ours(self, x, weight, bias, residual, scale, shift):
        from depthfuse.kernels.depthwise import depthwise_conv2d

        arguments = self._arguments() | {"act": self.act, "norm_eps": NORM_EPS if self.norm else None}
        return depthwise_conv2d(x, weight, bias, residual, scale, shift, **arguments)


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

        o = self.operands(dtype, "meta")
        y = torch.empty(self.rows, self.out_channels, dtype=dtype, device="meta")
        norm = {"norm_eps": NORM_EPS if self.norm else None}
        return linear.plan(*o.values(), y, act=self.act, **norm, config=None, target=target)

    def flops(self):
        return 2.0 * self.rows * self.channels * self.out_channels

    def elements_moved(self):
        outputs = self.rows * self.out_channels * (2 if self.residual else 1)
        return self.rows * self.channels + self.channels * self.out_channels + outputs

    def eager(self, x, weight, bias, residual, scale, shift):
        x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) if self.norm else x
        return tail(F.linear(x, weight, bias), residual, scale, shift, self.act)

    def ours(self, x, weight, bias, residual, scale, shift):
        from depthfuse.kernels.linear import linear

        norm_eps = NORM_EPS if self.norm else None
        return linear(x, weight, bias, residual, scale, shift, act=self.act, norm_eps=norm_eps)
