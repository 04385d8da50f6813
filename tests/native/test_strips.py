"""Expand, depthwise and project by strips of rows: the same bits as one after the other, without the memory between."""

import pytest
import torch
import torch.nn.functional as F
from native_ops import needs_engine

from depthfuse.native import plan as native
from depthfuse.native.plan import Builder, Node

pytestmark = needs_engine
POINTWISE = (1, 1, 1, 1, 0, 0, 1, 1)


NOTHING, FILTERED, ALL = range(3)


def block(x, expands, kernel, stride, padding, dilation, residual, watched, middle=72):
    """(plan, its outputs, what they should be in float64, floats that lie between).

    watched: what another node reads, so that it has to be there: what was filtered, and the expanded tensor.
    """
    generator = torch.Generator().manual_seed(3)
    n, h, w, c = x.shape
    middle = middle if expands else c
    expand = torch.randn(middle, c, generator=generator) / c**0.5
    taps = torch.randn(*kernel, middle, generator=generator) / 3
    project = torch.randn(c, middle, generator=generator) / middle**0.5
    biases = [torch.randn(size, generator=generator) for size in (middle, middle, c)]
    size = [
        (a + 2 * p - d * (k - 1) - 1) // s + 1
        for a, k, s, p, d in zip((h, w), kernel, stride, padding, dilation, strict=True)
    ]
    builder = Builder()
    source, image = builder.tensor(x.shape, native.INPUT), builder.tensor(x.shape)
    y = builder.tensor((n, *size, c), native.OUTPUT)
    filtered = builder.tensor((n, *size, middle))
    expanded = builder.tensor((n, h, w, middle)) if expands else image
    builder.pad(expanded, max(padding))
    builder.copy(source, image)
    if expands:
        builder.nodes.append(
            Node(native.CONV, image, expanded, act="relu6", numbers=POINTWISE, weight=expand, bias=biases[0])
        )
    numbers = (*kernel, *stride, *padding, *dilation)
    builder.nodes.append(
        Node(native.DEPTHWISE, expanded, filtered, act="silu", numbers=numbers, weight=taps, bias=biases[1])
    )
    builder.nodes.append(
        Node(
            native.CONV,
            filtered,
            y,
            x2=image if residual else -1,
            numbers=POINTWISE,
            weight=project,
            bias=biases[2],
        )
    )
    shapes = [(n, *size, c)]
    for seen in (filtered, expanded)[:watched]:
        mean = builder.tensor((n, 1, 1, middle), native.OUTPUT)
        builder.nodes.append(Node(native.MEAN, seen, mean))
        shapes.append((n, 1, 1, middle))
    planned = builder.build()
    outputs = [torch.full(shape, float("nan")) for shape in shapes]

    x, expand, taps, project, *biases = (t.double() for t in (x, expand, taps, project, *biases))
    v = F.relu6(F.linear(x, expand, biases[0])) if expands else x
    v = F.conv2d(
        v.permute(0, 3, 1, 2),
        taps.permute(2, 0, 1)[:, None],
        biases[1],
        stride,
        padding,
        dilation,
        groups=middle,
    )
    wanted = F.linear(F.silu(v).permute(0, 2, 3, 1), project, biases[2])
    return planned, outputs, wanted + x if residual else wanted, n * h * w * middle if expands else 0


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("shape", "expands", "kernel", "stride", "padding", "dilation", "residual"),
    [
        ((1, 64, 64, 16), True, (3, 3), (1, 1), (1, 1), (1, 1), True),
        ((1, 61, 67, 10), True, (3, 3), (2, 2), (1, 1), (1, 1), False),
        ((3, 47, 43, 12), True, (5, 5), (1, 1), (2, 2), (1, 1), True),
        ((2, 50, 41, 9), True, (5, 5), (2, 2), (2, 2), (1, 1), False),
        ((2, 44, 53, 8), True, (7, 7), (1, 1), (3, 3), (1, 1), True),
        ((1, 70, 61, 7), True, (3, 3), (1, 1), (0, 0), (1, 1), False),
        ((1, 70, 61, 7), True, (3, 5), (3, 2), (1, 2), (2, 1), False),
        ((40, 9, 13, 8), True, (3, 3), (1, 1), (4, 4), (1, 1), False),
        ((1, 3, 1300, 8), True, (3, 3), (1, 1), (1, 1), (1, 1), True),
        ((1, 1300, 3, 8), True, (1, 3), (2, 1), (0, 1), (1, 1), False),
        ((1, 112, 112, 32), False, (3, 3), (1, 1), (1, 1), (1, 1), True),
        ((2, 161, 167, 40), False, (5, 5), (2, 2), (2, 2), (1, 1), False),
    ],
)
def test_strips_give_the_same_bits(shape, expands, kernel, stride, padding, dilation, residual, threads):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    window = (expands, kernel, stride, padding, dilation, residual)
    fused, outputs, wanted, between = block(x, *window, watched=NOTHING)
    half, halves, _, _ = block(x, *window, watched=FILTERED)
    apart, others, _, _ = block(x, *window, watched=ALL)
    assert apart.bytes - fused.bytes > 0.9 * 4 * between  # it is fused, or this tests nothing
    assert apart.bytes > fused.bytes
    for _ in range(2):  # scratch memory is not clean the second time
        fused.run([x], outputs, threads)
        half.run([x], halves, threads)
        apart.run([x], others, threads)
        assert torch.equal(outputs[0], others[0])
        assert all(map(torch.equal, halves, others))
    times = half.profile([x], halves, runs=1)
    assert (times[1] == 0.0) == expands  # it ran with the depthwise convolution
    error = (outputs[0] - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5


def test_small_blocks_are_computed_one_after_the_other():
    """They stay in the cache, and strips of them would only expand rows twice."""
    x = torch.randn(1, 14, 14, 16)
    window = (True, (3, 3), (1, 1), (1, 1), (1, 1), True)
    fused, outputs, wanted, between = block(x, *window, watched=NOTHING)
    apart, *_ = block(x, *window, watched=ALL)
    assert apart.bytes - fused.bytes < 0.5 * 4 * between
    fused.run([x], outputs)
    assert (outputs[0] - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_what_runs_in_strips_takes_its_time_at_its_last_node():
    x = torch.randn(1, 64, 64, 16)
    window = (True, (3, 3), (1, 1), (1, 1), (1, 1), True)
    fused, outputs, *_ = block(x, *window, watched=NOTHING)
    copy, expand, depthwise, project = fused.profile([x], outputs, runs=3)
    assert expand == depthwise == 0.0 < min(copy, project)
    apart, outputs, *_ = block(x, *window, watched=ALL)
    assert min(apart.profile([x], outputs, runs=3)) > 0.0


def pair(x, middle, out, residual, watched):
    """(plan, its outputs, what they should be in float64). watched: another node reads what lies between."""
    generator = torch.Generator().manual_seed(5)
    n, h, w, c = x.shape
    expand = torch.randn(middle, c, generator=generator) / c**0.5
    project = torch.randn(out, middle, generator=generator) / middle**0.5
    biases = [torch.randn(size, generator=generator) for size in (middle, out)]
    builder = Builder()
    source, image = builder.tensor(x.shape, native.INPUT), builder.tensor(x.shape)
    between, y = builder.tensor((n, h, w, middle)), builder.tensor((n, h, w, out), native.OUTPUT)
    builder.copy(source, image)
    builder.nodes.append(
        Node(native.CONV, image, between, act="gelu", numbers=POINTWISE, weight=expand, bias=biases[0])
    )
    added = image if residual else -1
    builder.nodes.append(
        Node(native.CONV, between, y, x2=added, numbers=POINTWISE, weight=project, bias=biases[1])
    )
    shapes = [(n, h, w, out)]
    if watched:
        mean = builder.tensor((n, 1, 1, middle), native.OUTPUT)
        builder.nodes.append(Node(native.MEAN, between, mean))
        shapes.append((n, 1, 1, middle))
    x, expand, project, *biases = (t.double() for t in (x, expand, project, *biases))
    wanted = F.linear(F.gelu(F.linear(x, expand, biases[0])), project, biases[1])
    outputs = [torch.full(shape, float("nan")) for shape in shapes]
    return builder.build(), outputs, wanted + x if residual else wanted


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("shape", "middle", "out", "residual"),
    [
        ((1, 56, 56, 96), 384, 96, True),
        ((3, 97, 53, 20), 83, 20, True),
        ((2, 143, 61, 7), 61, 30, False),
        ((300, 1, 60, 12), 48, 5, False),
        ((1, 4000, 3, 40), 130, 1, False),
    ],
)
def test_an_mlp_in_strips_gives_the_same_bits(shape, middle, out, residual, threads):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    fused, outputs, wanted = pair(x, middle, out, residual, watched=False)
    apart, others, _ = pair(x, middle, out, residual, watched=True)
    for _ in range(2):  # scratch memory is not clean the second time
        fused.run([x], outputs, threads)
        apart.run([x], others, threads)
        assert torch.equal(outputs[0], others[0])
    assert (outputs[0] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert fused.profile([x], outputs, runs=1)[1] == 0.0  # or this tests nothing
    assert min(apart.profile([x], others, runs=1)) > 0.0


@pytest.mark.parametrize(
    ("shape", "middle", "out"),
    [
        ((1, 14, 14, 48), 192, 48),  # stays in the cache
        ((1, 64, 64, 160), 640, 160),  # each strip would read too many weights
        ((1, 1, 4096, 24), 96, 24),  # one row, which threads could not share
        ((1, 64, 64, 96), 120, 96),  # little lies between
        ((300, 1, 40, 12), 48, 12),  # a strip ends with its image, and would have few pixels
    ],
)
def test_an_mlp_that_strips_would_not_help(shape, middle, out):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    planned, outputs, wanted = pair(x, middle, out, residual=True, watched=False)
    assert min(planned.profile([x], outputs, runs=1)) > 0.0
    assert (outputs[0] - wanted).abs().max() < 1e-5 * wanted.abs().max()
