"""The fused modules: each implementation that they can choose against PyTorch's own modules, and their life."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from on_request import LONG
from torch import nn

from depthfuse.fused.layers import FusedConv2d, FusedLinear, plain_ops
from depthfuse.ops import ACTIVATIONS, BackendError
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, EXACT_ACTS, assert_within, integers

TORCH_ACT = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}


def bindings(module, input_size):
    """The module in each state it can be in: unbound, then bound to every candidate, then prepared."""
    yield "unbound"
    for name in module.candidates():
        module.use(name, input_size)
        assert module.implementation() == name
        yield name
    module.prepare(input_size)
    yield "prepared"


def wanted(module, x, residual):
    """The oracle's value and error."""
    if isinstance(module, FusedLinear):
        return oracle.linear(x, module.weight, module._tail(residual))
    return oracle.conv2d(x, module.weight, module._tail(residual), module._window())


def output_of(module, x):
    return F.conv2d(x, module.weight, None, module.stride, module.padding, module.dilation, module.groups)


CONVS = {  # channels, filters, kernel, stride, padding, dilation, groups
    "stem": (3, 8, 3, 2, 1, 1, 1),
    "dense": (16, 24, 3, 1, 1, 1, 1),
    "strided": (8, 16, 3, 2, 1, 1, 1),
    "dilated": (8, 8, 3, 1, 2, 2, 1),
    "grouped": (16, 24, 3, 1, 1, 1, 4),
    "depthwise": (24, 24, 3, 1, 1, 1, 24),
    "depthwise_5_s2": (16, 16, 5, 2, 2, 1, 16),
    "multiplier": (8, 16, 3, 1, 1, 1, 8),
    "pointwise": (16, 24, 1, 1, 0, 1, 1),
    "pointwise_s2": (24, 16, 1, 2, 0, 1, 1),
    "pointwise_grouped": (16, 24, 1, 1, 0, 1, 4),
    "pointwise_padded": (8, 8, 1, 1, 1, 1, 1),
    "even": (8, 16, 2, 2, 0, 1, 1),
}


def fused_conv(name, act="none", terms=("bias", "scale", "shift"), dtype=torch.float32, make=None):
    channels, filters, kernel, stride, padding, dilation, groups = CONVS[name]
    make = make or (lambda shape, dtype: torch.randn(shape).to(dtype))
    weight = make((filters, channels // groups, kernel, kernel), dtype)
    vectors = {n: make((filters,), dtype) for n in ("bias", "scale", "shift") if n in terms}
    geometry = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}
    return FusedConv2d(weight, **vectors, **geometry, groups=groups, act=act)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ACT)
@pytest.mark.parametrize("name", CONVS)
def test_conv_in_every_implementation(name, act, residual):
    for terms in ((), ("bias", "scale", "shift")):
        module = fused_conv(name, act, terms)
        x = torch.randn(2, CONVS[name][0], 7, 13)
        other = torch.randn_like(output_of(module, x)) if residual else None
        y, bound = wanted(module, x, other)
        for implementation in bindings(module, x.shape):
            for layout in (torch.contiguous_format, torch.channels_last):
                given_x = x.contiguous(memory_format=layout)
                result = module(given_x, other)
                assert_within(result, y, bound)
                assert result.is_contiguous(memory_format=torch.channels_last), implementation
                assert torch.equal(given_x, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_integers_are_exact(name, act, dtype):
    """Also in the narrow types, and after the residual: it must be left as it was."""
    module = fused_conv(name, act, dtype=dtype, make=integers)
    x = integers((2, CONVS[name][0], 5, 4), dtype)
    other = integers(output_of(module, x).shape, dtype)
    before = other.clone()
    y, _ = wanted(module, x, other)
    for implementation in bindings(module, x.shape):
        result = module(x, other)
        assert result.dtype == dtype
        assert torch.equal(result.double(), y), implementation
        assert torch.equal(other, before), implementation


@pytest.mark.parametrize("name", CONVS)
def test_conv_in_other_sizes_than_prepared_for(name):
    """Batch and image size other than the packed layout was chosen for, down to maps smaller than the kernel."""
    module = fused_conv(name, "relu")
    channels, _, kernel, _, padding, dilation, _ = CONVS[name]
    for _ in bindings(module, (1, channels, 14, 14)):
        for batch, height, width in ((1, 14, 14), (3, 14, 14), (1, 28, 9), (5, 3, 2), (2, 1, 1), (0, 14, 14)):
            if min(height, width) + 2 * padding <= dilation * (kernel - 1):
                continue
            x = torch.randn(batch, channels, height, width)
            assert_within(module(x), *wanted(module, x, None))


@settings(deadline=None, max_examples=1000 if LONG else 40)
@given(st.data())
def test_conv_of_any_geometry(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups = draw(st.sampled_from([1, 1, 2, 8]))
    channels, filters = (groups * draw(st.sampled_from([1, 2, 3, 8])) for _ in range(2))
    kernel, stride, dilation = (
        draw(st.tuples(*[st.sampled_from(sizes)] * 2)) for sizes in ([1, 2, 3, 5], [1, 2], [1, 2])
    )
    padding = draw(st.tuples(*[st.integers(0, 3)] * 2))
    vectors = {n: torch.randn(filters) for n in ("bias", "scale", "shift") if draw(st.booleans())}
    module = FusedConv2d(
        torch.randn(filters, channels // groups, *kernel),
        **vectors,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=draw(st.sampled_from(list(ACT))),
    )
    x = torch.randn(draw(st.integers(1, 3)), channels, *draw(st.tuples(*[st.sampled_from([9, 10, 13])] * 2)))
    residual = torch.randn_like(output_of(module, x)) if draw(st.booleans()) else None
    for _ in bindings(module, draw(st.sampled_from([tuple(x.shape), (1, channels, 20, 20)]))):
        assert_within(module(x, residual), *wanted(module, x, residual))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ACT)
def test_linear_in_every_implementation(act, residual):
    for shape in ((5, 24), (2, 7, 24), (2, 3, 3, 24), (1, 24), (24,), (0, 24)):
        for terms in ((), ("bias", "scale", "shift")):
            vectors = {name: torch.randn(10) for name in terms}
            module = FusedLinear(torch.randn(10, 24), **vectors, act=act)
            x = torch.randn(shape)
            other = torch.randn(*shape[:-1], 10) if residual else None
            before = None if other is None else other.clone()
            y, bound = wanted(module, x, other)
            for implementation in bindings(module, (4, 24)):
                assert_within(module(x, other), y, bound)
                assert other is None or torch.equal(other, before), implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_linear_integers_are_exact(dtype):
    vectors = {name: integers((10,), dtype) for name in ("bias", "scale", "shift")}
    module = FusedLinear(integers((10, 24), dtype), **vectors, act="relu")
    x, other = integers((3, 5, 48), dtype)[..., ::2], integers((3, 10, 5), dtype).transpose(1, 2)
    y, _ = wanted(module, x, other)
    for implementation in bindings(module, x.shape):
        assert torch.equal(module(x, other).double(), y), implementation


@pytest.mark.parametrize("act", ACT)
@torch.no_grad()
def test_from_torch_modules(act):
    scale, shift = torch.randn(8), torch.randn(8)
    conv, linear = nn.Conv2d(6, 8, 3, 2, 1, groups=2), nn.Linear(6, 8, bias=False)
    before = [copy.deepcopy(m.state_dict()) for m in (conv, linear)]
    image, rows = torch.randn(2, 6, 9, 9), torch.randn(4, 6)
    unfused = TORCH_ACT[act](conv(image)) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    fused = FusedConv2d.from_conv(conv, act=act, scale=scale, shift=shift)
    torch.testing.assert_close(fused(image), unfused)
    unfused = TORCH_ACT[act](linear(rows)) * scale + shift
    fused = FusedLinear.from_linear(linear, act=act, scale=scale, shift=shift)
    torch.testing.assert_close(fused(rows), unfused)
    fused.weight.zero_()
    for module, state in zip((conv, linear), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding="same")]
)
def test_from_conv_refuses_other_padding(conv):
    with pytest.raises(ValueError, match="expected a convolution with zero padding in numbers, got Conv2d"):
        FusedConv2d.from_conv(conv)


def make_both():
    conv = fused_conv("dense", "relu")
    linear = FusedLinear(torch.randn(8, 6), torch.randn(8), torch.randn(8), torch.randn(8), act="gelu")
    return [(conv, torch.randn(2, 16, 7, 7)), (linear, torch.randn(5, 6))]


def test_nothing_to_train():
    for module, x in make_both():
        assert list(module.parameters()) == []
        assert not module.training
        x.requires_grad_()
        for implementation in bindings(module, x.shape):
            y = module(x)
            assert not y.requires_grad, implementation
            assert not module(x.detach(), y.clone().requires_grad_()).requires_grad, implementation


def test_state_dict_rebuilds_it():
    for module, x in make_both():
        module.prepare(x.shape)
        expected = module(x)
        state = module.state_dict()
        assert set(state) == {"weight", "bias", "scale", "shift"}
        other = copy.deepcopy(module)
        for buffer in other.buffers():
            buffer.zero_()
        other.prepare(x.shape)
        assert not torch.equal(other(x), expected)
        other.load_state_dict(state)  # must drop what was packed from the old weight
        torch.testing.assert_close(other(x), expected)
        other.prepare(x.shape)
        assert torch.equal(other(x), expected)


def test_copy_pickle_and_cast_drop_packed_weights():
    for module, x in make_both():
        for name in module.candidates():
            module.use(name, x.shape)
            expected = module(x)
            for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                torch.testing.assert_close(other(x), expected)
            assert module.implementation() == name
            wide = copy.deepcopy(module).double()
            assert wide(x.double()).dtype == torch.float64
            torch.testing.assert_close(wide(x.double()), expected.double(), rtol=1e-4, atol=1e-4)


def test_repr_says_what_runs():
    (conv, x), (linear, rows) = make_both()
    conv.use("plain", x.shape)
    assert "16, 24, kernel_size=(3, 3), stride=(1, 1)" in repr(conv)
    assert "implementation='plain', epilogue='bias + relu + affine'" in repr(conv)
    linear.use("gemm", rows.shape)
    assert "6, 8, implementation='gemm', epilogue='bias + gelu + affine'" in repr(linear)
    assert "epilogue='none'" in repr(FusedLinear(torch.randn(2, 2)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown act 'mish'; expected one of none, relu"):
        FusedLinear(torch.randn(2, 2), act="mish")
    with pytest.raises(ValueError, match="'winograd'"):
        fused_conv("dense").use("winograd", (1, 16, 7, 7))
    with pytest.raises(ValueError, match="'gemm'"):
        fused_conv("dense").use("gemm", (1, 16, 7, 7))  # only for 1x1
    with pytest.raises(ValueError, match="'winograd'"):
        FusedLinear(torch.randn(2, 2)).use("winograd", (1, 2))


def test_explicit_triton_on_cpu_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = FusedLinear(torch.randn(2, 2), backend="triton")
    with pytest.raises(BackendError, match="the device is cpu"):
        module(torch.randn(1, 2))


def test_bad_inputs_are_refused_in_every_implementation():
    conv, linear = fused_conv("pointwise", "relu"), FusedLinear(torch.randn(8, 6), torch.randn(8))
    x, rows = torch.randn(2, 16, 5, 5), torch.randn(3, 6)
    bad_conv = [
        (ValueError, (torch.randn(2, 15, 5, 5),), r"\[2, 15, 5, 5\]|15 channels"),
        (ValueError, (torch.randn(16, 5, 5),), r"\[16, 5, 5\], expected \[N, C, H, W\]"),
        (TypeError, (x.double(),), "torch.float32, expected x's dtype torch.float64"),
        (
            ValueError,
            (x, torch.randn(2, 24, 4, 4)),
            r"residual has shape \[2, 24, 4, 4\], expected \[2, 24, 5, 5\]",
        ),
        (ValueError, (x, torch.randn(1, 24, 5, 5)), r"residual has shape \[1, 24, 5, 5\]"),
        (ValueError, (x, torch.randn(24, 5, 5)), r"residual has shape \[24, 5, 5\]"),
        (TypeError, (x, torch.randn(2, 24, 5, 5).double()), "residual has dtype torch.float64"),
    ]
    bad_linear = [
        (ValueError, (torch.randn(3, 5),), r"\[3, 5\], expected \[..., 6\]"),
        (TypeError, (rows.double(),), "torch.float32, expected x's dtype torch.float64"),
        (ValueError, (rows, torch.randn(1, 8)), r"residual has shape \[1, 8\], expected \[3, 8\]"),
        (ValueError, (rows, torch.randn(3, 1)), r"residual has shape \[3, 1\], expected \[3, 8\]"),
        (ValueError, (rows, torch.randn(8)), r"residual has shape \[8\], expected \[3, 8\]"),
        (TypeError, (rows, torch.randn(3, 8).double()), "residual has dtype torch.float64"),
    ]
    for module, good, cases in ((conv, x, bad_conv), (linear, rows, bad_linear)):
        for implementation in bindings(module, good.shape):
            for kind, arguments, message in cases:
                with pytest.raises(kind, match=message):
                    module(*arguments)
            assert module(good).isfinite().all(), implementation


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_goes_through_wherever_the_module_says_so(act):
    """`swallows_nan` tells the truth, and `plain_ops` lets NaN through in any case."""
    for module, x in (
        (fused_conv("pointwise", act), torch.randn(2, 16, 5, 5)),
        (FusedLinear(torch.randn(8, 6), act=act), torch.randn(3, 6)),
    ):
        x.flatten()[7] = float("nan")
        x.flatten()[0] = float("inf")
        plain = module(x)
        assert plain.isnan().any()
        for implementation in bindings(module, x.shape):
            if not module.swallows_nan():
                assert torch.equal(module(x).isnan(), plain.isnan()), implementation
            with plain_ops():
                assert torch.equal(module(x).isnan(), plain.isnan()), implementation


def test_plain_ops_is_for_this_thread_only():
    module, x = make_both()[0]
    module.prepare(x.shape)
    seen = []
    with plain_ops():
        thread = threading.Thread(target=lambda: seen.append(module._runs_bound(x)))
        thread.start()
        thread.join()
        assert not module._runs_bound(x)
    assert seen == [module._runner is not None]
    assert module._runs_bound(x) == seen[0]


def test_several_threads_call_one_module():
    for module, x in make_both():
        inputs = [torch.randn(1 + i % 3, *x.shape[1:]) for i in range(24)]
        for implementation in bindings(module, x.shape):
            expected = [module(each) for each in inputs]
            with ThreadPoolExecutor(4) as pool:
                for got, one in zip(pool.map(module, inputs), expected, strict=True):
                    assert torch.equal(got, one), implementation
