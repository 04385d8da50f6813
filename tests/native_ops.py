"""Single operations of the engine on tensors as PyTorch has them, for the tests."""

import pytest
import torch

from depthfuse.native import plan as native
from depthfuse.native.library import why_missing
from depthfuse.native.plan import Builder, Node

needs_engine = pytest.mark.skipif(why_missing() is not None, reason=f"no native engine: {why_missing()}")

TAIL = ("bias", "scale", "shift")


def run(builder, inputs, output, threads=2):
    """The output [n, h, w, c] of a plan, which starts as NaN."""
    planned = builder.build()
    result = torch.full(builder.shape(output), float("nan"))
    planned.run([x.contiguous() for x in inputs], [result], threads)
    return result


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def padded_input(builder, x, border):
    """x [N, C, H, W] as a tensor of the arena with a border."""
    n, c, h, w = x.shape
    source, tensor = builder.tensor((n, h, w, c), native.INPUT), builder.tensor((n, h, w, c))
    builder.pad(tensor, border)
    builder.nodes.append(Node(native.FROM_PLANES, source, tensor))
    return tensor


def convolve(x, weight, window, tail, algorithm=native.DIRECT, threads=2):
    """y [N, K, P, Q] = the engine's convolution of x [N, C, H, W] with weight [K, C or 1, R, S]."""
    builder, inputs = Builder(), [x]
    border = max(window.padding)
    source = padded_input(builder, x, border)
    size = window.output_size(x.shape[2:], weight.shape[2:])
    y = builder.tensor((x.shape[0], *size, weight.shape[0]))
    builder.pad(y, 1)  # nothing may depend on it
    residual = -1
    if tail.residual is not None:
        residual = padded_input(builder, tail.residual, 2)
        inputs.append(tail.residual)
    depthwise = window.groups == x.shape[1] == weight.shape[0] > 1
    numbers = (*weight.shape[2:], *window.stride, *window.padding, *window.dilation)
    taps = weight.permute(2, 3, 1, 0) if depthwise else weight.permute(0, 2, 3, 1)
    node = Node(
        native.DEPTHWISE if depthwise else native.CONV, source, y, x2=residual, act=tail.act, algorithm=algorithm,
        numbers=numbers, groups=window.groups, weight=taps, **{name: getattr(tail, name) for name in TAIL},
    )  # fmt: skip
    builder.nodes.append(node)
    out = builder.tensor(builder.shape(y), native.OUTPUT)
    builder.nodes.append(Node(native.TO_PLANES, y, out))
    n, h, w, c = builder.shape(out)
    return run(builder, inputs, out, threads).view(n, c, h, w)
