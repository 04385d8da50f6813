"""`depthfuse.ops.conv2d` on a CPU: values, layouts, errors, and what PyTorch's tools ask of an op."""

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from on_request import LONG
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.kernels.arguments import Tail, Window
from depthfuse.ops import ACTIVATIONS, BackendError, backend, conv2d
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, EXACT_ACTS, assert_within, integers

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def is_channels_last(y):
    _, channels, height, width = y.shape
    return y.stride() == (height * width * channels, 1, width * channels, channels)


def tail_of(x, weight, window, terms, make, act):
    """The tail whose tensors named in `terms` are there, made by `make(shape, dtype)`."""
    vector = (weight.shape[0],)
    size = window.output_size(x.shape[2:], weight.shape[2:])
    shapes = {"bias": vector, "residual": (x.shape[0], *vector, *size), "scale": vector, "shift": vector}
    return Tail(**{name: make(shape, x.dtype) for name, shape in shapes.items() if name in terms}, act=act)


def call(x, weight, tail, window, **options):
    return conv2d(x, weight, **tail._asdict(), **window._asdict(), **options)


def noise(shape, dtype):
    return torch.randn(shape).to(dtype)


TERMS = [(), ("bias",), ("residual",), ("scale", "shift"), ("bias", "residual", "scale", "shift")]


def test_activation_names():
    assert set(ACTIVATIONS) == set(ACT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_integers_are_exact(terms, act, dtype):
    """Small integers leave nothing to round: any wrong tap, channel or order is a plain mismatch."""
    for groups, channels, filters in ((1, 3, 8), (2, 8, 6), (8, 8, 8)):
        x, weight = integers((2, channels, 7, 5), dtype), integers((filters, channels // groups, 3, 3), dtype)
        window = Window((2, 1), (1, 2), (1, 1), groups)
        tail = tail_of(x, weight, window, terms, integers, act)
        y = call(x, weight, tail, window)
        assert y.dtype == dtype
        assert is_channels_last(y)
        assert torch.equal(y.double(), oracle.conv2d(x, weight, tail, window).value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACT)
def test_every_activation(act, dtype):
    x, weight = noise((2, 16, 7, 7), dtype) * 2, noise((24, 16, 3, 3), dtype) / 4
    for terms in TERMS:
        window = Window(padding=(1, 1))
        tail = tail_of(x, weight, window, terms, noise, act)
        assert_within(call(x, weight, tail, window), *oracle.conv2d(x, weight, tail, window))


@functools.cache
def pytorch_is_wrong():
    """Whether PyTorch's own bfloat16 convolution is, as on processors with AMX (2.13.0): images that one window spans
    come out as something else where the stride is 2.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator) for size in ((2, 3, 13, 1), (3, 3, 2, 2)))
    x, weight = x.bfloat16(), weight.bfloat16()
    y = F.conv2d(x, weight, None, (1, 2), (0, 1))
    exact = F.conv2d(x.double(), weight.double(), None, (1, 2), (0, 1))
    return not torch.allclose(y.double(), exact, rtol=0.1, atol=0.1)


@settings(deadline=None, max_examples=2000 if LONG else 60)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    channels, filters = (groups * draw(st.sampled_from([1, 2, 3])) for _ in range(2))
    if draw(st.booleans()):  # the usual widths, dense or depthwise
        channels = draw(st.sampled_from([3, 8, 16, 24]))
        groups = draw(st.sampled_from([1, channels]))
        filters = channels if groups > 1 else draw(st.sampled_from([3, 8, 16, 24]))
    kernel = draw(st.tuples(*[st.sampled_from([1, 2, 3, 5])] * 2))
    stride, dilation = (draw(st.tuples(*[st.sampled_from([1, 2])] * 2)) for _ in range(2))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    size = draw(st.tuples(*[st.sampled_from([1, 2, 3, 7, 13])] * 2))
    padding = [
        max(draw(st.integers(0, 2)), (r + 2 - n) // 2 if r >= n else 0)
        for r, n in zip(reach, size, strict=True)
    ]
    window = Window(stride, tuple(padding), dilation, groups)
    width = window.output_size(size, kernel)[1]
    terms = draw(st.sets(st.sampled_from(["bias", "residual", "scale", "shift"])))
    act, dtype = draw(st.sampled_from(list(ACT))), draw(st.sampled_from(DTYPES[:3]))
    assume(not (pytorch_is_wrong() and dtype == torch.bfloat16 and width == 1 and stride[1] > 1))
    x = noise((draw(st.sampled_from([0, 1, 2, 3])), channels, *size), dtype)
    weight = noise((filters, channels // groups, *kernel), dtype)
    tail = tail_of(x, weight, window, terms, noise, act)
    y = call(x, weight, tail, window)
    assert is_channels_last(y)
    assert_within(y, *oracle.conv2d(x, weight, tail, window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 8])
def test_layer_norm_over_channels(groups, dtype):
    x, weight = noise((2, 8, 5, 6), dtype), noise((8, 8 // groups, 3, 3), dtype)
    window = Window(padding=(1, 1), groups=groups)
    tail = tail_of(x, weight, window, TERMS[-1], noise, "silu")
    y = call(x, weight, tail, window, norm_eps=1e-6)
    assert is_channels_last(y)
    assert_within(y, *oracle.conv2d(x, weight, tail, window, 1e-6))


def layouts(x):
    """`x` in every layout that a caller may hold it in, by name."""
    batch, channels, height, width = x.shape
    big = torch.full((batch + 1, channels + 2, height + 3, 2 * width), float("nan"), dtype=x.dtype)
    sliced = big[1:, 1:-1, 2:-1, ::2].copy_(x)
    buffer = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype)
    offset = buffer[3:].view(x.shape).copy_(x)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "offset": offset,
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": x[:1].expand(batch, -1, -1, -1),
    }


@pytest.mark.parametrize("groups", [1, 8])
def test_layouts(groups):
    x, weight = integers((2, 8, 7, 13), torch.float32), integers((8, 8 // groups, 3, 3), torch.float32)
    residual = integers((2, 8, 7, 13), torch.float32)
    for name, given_x in layouts(x).items():
        for other, given_residual in layouts(residual).items():
            before = given_x.clone(), given_residual.clone()
            y = conv2d(given_x, weight, residual=given_residual, padding=1, groups=groups, act="relu")
            plain = (F.conv2d(given_x, weight, padding=1, groups=groups) + given_residual).relu()
            assert torch.equal(y, plain), (name, other)
            assert is_channels_last(y), (name, other)
            assert torch.equal(given_x, before[0])
            assert torch.equal(given_residual, before[1])


def test_empty_batch():
    x, weight, bias = torch.empty(0, 3, 7, 5), torch.randn(8, 3, 3, 3), torch.randn(8)
    y = conv2d(x, weight, bias, torch.empty(0, 8, 7, 5), bias, bias, padding=1, act="gelu")
    assert y.shape == (0, 8, 7, 5)
    assert is_channels_last(y)


@pytest.mark.parametrize("act", ACT)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_as_plain_torch(value, act):
    torch_act = {
        "none": lambda z: z,
        "relu": F.relu,
        "relu6": F.relu6,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "silu": F.silu,
        "hardswish": F.hardswish,
    }[act]
    x, weight, bias = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    residual = torch.randn(1, 4, 5, 5)
    x[0, 1, 2, 2] = value
    residual[0, 0, 0, 0] = value
    y = conv2d(x, weight, bias, residual, bias, bias, padding=1, act=act)
    wide = bias.view(1, -1, 1, 1)
    plain = wide * torch_act(F.conv2d(x, weight, bias, padding=1) + residual) + wide
    assert torch.equal(y.isnan(), plain.isnan())
    assert torch.equal(y.isinf(), plain.isinf())
    torch.testing.assert_close(y, plain, equal_nan=True)


X, W, V = torch.zeros(2, 6, 5, 5), torch.zeros(8, 6, 3, 3), torch.zeros(8)
BAD = {
    "x not 4d": (ValueError, {"x": torch.zeros(6, 5, 5)}, ["x", "[6, 5, 5]", "[N, C, H, W]"]),
    "weight not 4d": (
        ValueError,
        {"weight": torch.zeros(8, 6)},
        ["weight", "[8, 6]", "[K, C / groups, R, S]"],
    ),
    "channels": (ValueError, {"weight": torch.zeros(8, 5, 3, 3)}, ["weight", "[8, 5, 3, 3]", "[K, 6, R, S]"]),
    "group channels": (ValueError, {"groups": 2}, ["weight", "[8, 6, 3, 3]", "[K, 3, R, S]", "groups is 2"]),
    "groups do not divide": (ValueError, {"groups": 4}, ["groups 4", "6 channels"]),
    "groups 0": (ValueError, {"groups": 0}, ["groups 0"]),
    "bias length": (ValueError, {"bias": torch.zeros(7)}, ["bias", "[7]", "[8]"]),
    "scale length": (ValueError, {"scale": torch.zeros(1)}, ["scale", "[1]", "[8]"]),
    "shift is 2d": (ValueError, {"shift": torch.zeros(8, 1)}, ["shift", "[8, 1]", "[8]"]),
    "residual": (
        ValueError,
        {"residual": torch.zeros(2, 8, 5, 5)},
        ["residual", "[2, 8, 5, 5]", "[2, 8, 3, 3]"],
    ),
    "residual would broadcast": (
        ValueError,
        {"residual": torch.zeros(1, 8, 3, 3)},
        ["residual", "[1, 8, 3, 3]", "[2, 8, 3, 3]"],
    ),
    "dtype mix": (TypeError, {"weight": W.double()}, ["weight", "torch.float64", "torch.float32"]),
    "residual dtype": (
        TypeError,
        {"residual": torch.zeros(2, 8, 3, 3).half()},
        ["residual", "torch.float16", "torch.float32"],
    ),
    "integers": (TypeError, {"x": X.int(), "weight": W.int()}, ["x", "torch.int32", "floating-point"]),
    "act": (ValueError, {"act": "mish"}, ["'mish'", "hardswish"]),
    "device": (ValueError, {"bias": torch.zeros(8, device="meta")}, ["bias", "meta", "cpu"]),
    "stride": (ValueError, {"stride": 0}, ["stride", "(0, 0)", "at least 1"]),
    "padding": (ValueError, {"padding": -1}, ["padding", "(-1, -1)", "at least 0"]),
    "dilation": (ValueError, {"dilation": (1, 0)}, ["dilation", "(1, 0)", "at least 1"]),
    "three strides": (ValueError, {"stride": (1, 1, 1)}, ["(1, 1, 1)", "two"]),
    "kernel too large": (ValueError, {"x": torch.zeros(2, 6, 2, 2)}, ["[2, 6, 2, 2]", "[3, 3]"]),
    "norm_eps": (ValueError, {"norm_eps": float("nan")}, ["norm_eps", "nan", "at least 0"]),
    "channels beyond 32 bits": (
        ValueError,
        {
            "x": torch.empty(1, 2**31, 1, 1, device="meta"),
            "weight": torch.empty(1, 2**31, 1, 1, device="meta"),
            "bias": None,
        },
        ["x", "2147483648", "2**31"],
    ),
    "backend": (ValueError, {"backend": "cuda"}, ["'cuda'", "auto", "triton", "reference"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    kind, change, words = BAD[case]
    with pytest.raises(kind) as caught:
        conv2d(**{"x": X, "weight": W, "bias": V, **change})
    for word in words:
        assert word in str(caught.value)


def full_call(x, weight, vector, residual):
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    return torch.ops.depthfuse.conv2d(x, weight, vector, residual, vector, vector, *geometry, "relu", "auto")


def full_arguments(batch=2):
    return torch.randn(batch, 6, 5, 7), torch.randn(8, 6, 3, 3), torch.randn(8), torch.randn(batch, 8, 5, 7)


@pytest.mark.parametrize("case", ["full", "empty", "depthwise", "nchw slice", "one pixel"])
def test_opcheck(case):
    x, weight, vector, residual = full_arguments(0 if case == "empty" else 2)
    terms, groups, padding = (vector, residual, vector, vector), 1, [1, 1]
    if case == "depthwise":
        weight, groups, terms = torch.randn(6, 1, 3, 3), 6, (None,) * 4
    if case == "nchw slice":
        x = torch.randn(2, 6, 5, 14)[..., ::2]
    if case == "one pixel":
        x, weight, padding, terms = torch.randn(1, 6, 1, 1), torch.randn(1, 6, 1, 1), [0, 0], (None,) * 4
    arguments = (x, weight, *terms, [1, 1], padding, [1, 1], groups, "gelu", "auto")
    checks = torch.library.opcheck(torch.ops.depthfuse.conv2d.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(compiler, dynamic):
    torch._dynamo.reset()

    def run(x, weight, vector, residual):
        return conv2d(x, weight, vector, residual, vector, vector, padding=1, act="silu") * 2

    compiled = torch.compile(run, backend=compiler, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        arguments = full_arguments(batch)
        assert torch.equal(compiled(*arguments), run(*arguments))
        assert compiled(*arguments).stride() == run(*arguments).stride()


def test_export():
    class Net(torch.nn.Module):
        def forward(self, x, weight, vector, residual):
            return full_call(x, weight, vector, residual)

    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = ({0: batch}, None, None, {0: batch})
    program = torch.export.export(Net(), full_arguments(), dynamic_shapes=dynamic)
    assert "depthfuse.conv2d" in str(program.graph)
    for count in (2, 5):
        arguments = full_arguments(count)
        assert torch.equal(program.module()(*arguments), full_call(*arguments))


@pytest.mark.parametrize(
    "shape, filters, kernel, window",
    [
        ((2, 6, 7, 5), 8, (3, 3), Window((2, 2), (1, 1))),
        ((1, 8, 13, 13), 8, (5, 3), Window(padding=(2, 1), groups=8)),
        ((3, 8, 9, 9), 12, (3, 3), Window(dilation=(2, 2), groups=4)),
        ((0, 6, 7, 5), 8, (3, 3), Window()),
    ],
)
def test_flops_as_plain_convolution(shape, filters, kernel, window):
    x, weight = torch.randn(shape), torch.randn(filters, shape[1] // window.groups, *kernel)
    with FlopCounterMode(display=False) as fused:
        call(x, weight, Tail(torch.randn(filters), act="relu"), window)
    with FlopCounterMode(display=False) as plain:
        F.conv2d(x, weight, None, *window)
    assert fused.get_total_flops() == plain.get_total_flops()


def test_no_autograd():
    x, weight, vector, residual = (t.requires_grad_() for t in full_arguments())
    y = full_call(x, weight, vector, residual)
    assert not y.requires_grad
    assert torch.equal(y, full_call(*(t.detach() for t in (x, weight, vector, residual))))


def test_explicit_triton_on_cpu_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="CUDA or ROCm device, and the device is cpu"):
        conv2d(X, W, backend="triton")


def test_auto_falls_back_and_logs_once(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="depthfuse.ops.backend"):
        for _ in range(3):
            assert torch.equal(conv2d(X, W), torch.zeros(2, 8, 3, 3))
    assert len(caplog.records) == 1
    assert "reference" in caplog.text
    assert "device is cpu" in caplog.text
