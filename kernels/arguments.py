"""What the operators take beside their input, as values: given on whole, and spelled out only where it is used.

Nothing of Triton is imported here, because `depthfuse.ops` names these where there is no Triton, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Tail(NamedTuple):
    """What follows a product: y = scale * act(product + bias + residual) + shift.

    Attributes:
        bias, scale, shift: [K], a value for each output channel, or None.
        residual: shaped like the output, or None.
        act: the activation's name, see `depthfuse.ops.ACTIVATIONS`.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "none"

    def tensors(self, bias: str = "bias") -> dict[str, Tensor | None]:
        """The tensors by name. `bias`: what the operator calls its last bias ("b2" where it has several)."""
        return {bias: self.bias, "residual": self.residual, "scale": self.scale, "shift": self.shift}


NO_TAIL = Tail()


class Window(NamedTuple):
    """How the kernel of a convolution moves over its image; pairs are (height, width)."""

    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Output height and width for an image of `size`; below 1 where the kernel is larger than the padded image."""
        return [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        ]

    def constants(self) -> dict[str, int]:
        """Stride, padding and dilation as the kernels' compile-time arguments."""
        named = {"STRIDE": self.stride, "PADDING": self.padding, "DILATION": self.dilation}
        return {f"{name}_{axis}": pair[i] for name, pair in named.items() for i, axis in enumerate("HW")}


POINTWISE = Window()  # stride 1, no padding: all of a 1x1 convolution


class TwoLayers(NamedTuple):
    """The weights of two layers in one operator; the second one's bias is its tail's."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor


class ThreeLayers(NamedTuple):
    """The weights of three layers in one operator; the last one's bias is its tail's."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
