"""`depthfuse.ops.linear` on a CPU: values, layouts, errors, and what PyTorch's tools ask of an op."""

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from on_request import LONG
from torch.utils.flop_counter import FlopCounterMode

from depthfuse.kernels.arguments import Tail
from depthfuse.ops import BackendError, backend, linear
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, EXACT_ACTS, assert_within, integers

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TERMS = [(), ("bias",), ("residual",), ("scale", "shift"), ("bias", "residual", "scale", "shift")]


def tail_of(x, weight, terms, make, act):
    """The tail whose tensors named in `terms` are there, made by `make(shape, dtype)`."""
    vector = (weight.shape[0],)
    shapes = {"bias": vector, "residual": (*x.shape[:-1], *vector), "scale": vector, "shift": vector}
    return Tail(**{name: make(shape, x.dtype) for name, shape in shapes.items() if name in terms}, act=act)


def noise(shape, dtype):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", EXACT_ACTS)
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_integers_are_exact(terms, act, dtype):
    """Small integers leave nothing to round: any wrong index or order is a plain mismatch."""
    for shape in ((5, 24), (2, 7, 24), (24,)):
        x, weight = integers(shape, dtype), integers((13, 24), dtype)
        tail = tail_of(x, weight, terms, integers, act)
        y = linear(x, weight, **tail._asdict())
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert torch.equal(y.double(), oracle.linear(x, weight, tail).value)


@settings(deadline=None, max_examples=2000 if LONG else 80)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lead = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3))
    features, filters = draw(st.tuples(*[st.sampled_from([1, 3, 8, 17, 64])] * 2))
    terms = draw(st.sets(st.sampled_from(["bias", "residual", "scale", "shift"])))
    act, dtype = draw(st.sampled_from(list(ACT))), draw(st.sampled_from(DTYPES))
    x, weight = noise((*lead, features), dtype), noise((filters, features), dtype)
    tail = tail_of(x, weight, terms, noise, act)
    y = linear(x, weight, **tail._asdict())
    assert y.is_contiguous()
    assert_within(y, *oracle.linear(x, weight, tail))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 17), (8,)])
def test_layer_norm_before_the_product(shape, dtype):
    for eps in (1e-6, 0.5):
        x, weight = noise(shape, dtype) + 3, noise((13, shape[-1]), dtype)
        tail = tail_of(x, weight, TERMS[-1], noise, "silu")
        y = linear(x, weight, **tail._asdict(), norm_eps=eps)
        assert_within(y, *oracle.linear(x, weight, tail, eps))


def layouts(x):
    """`x` in every layout that a caller may hold it in."""
    rows, tokens, features = x.shape
    big = torch.full((rows + 1, tokens + 2, 2 * features), float("nan"))
    buffer = torch.full((x.numel() + 3,), float("nan"))
    return {
        "plain": x.clone(),
        "sliced": big[1:, 1:-1, ::2].copy_(x),
        "offset": buffer[3:].view(x.shape).copy_(x),
        "turned": x.transpose(0, 2).contiguous().transpose(0, 2),
        "expanded": x[:1].expand(rows, -1, -1),
    }


def test_layouts():
    x, weight, residual = (integers(shape, torch.float32) for shape in ((3, 5, 24), (8, 24), (3, 5, 8)))
    for name, given_x in layouts(x).items():
        for other, given_residual in layouts(residual).items():
            before = given_x.clone(), given_residual.clone()
            y = linear(given_x, weight, residual=given_residual, act="relu")
            assert torch.equal(y, (given_x @ weight.T + given_residual).relu()), (name, other)
            assert y.is_contiguous(), (name, other)
            assert torch.equal(given_x, before[0])
            assert torch.equal(given_residual, before[1])


def test_identity_does_not_alias():
    """Nothing to do but the product: the result is still a tensor of its own."""
    x, weight = torch.randn(3, 4), torch.eye(4)
    y = linear(x, weight)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


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
    x, weight, bias, residual = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5), torch.randn(4, 5)
    x[1, 1] = residual[3, 0] = value
    y = linear(x, weight, bias, residual, bias, bias, act=act)
    plain = bias * torch_act(F.linear(x, weight, bias) + residual) + bias
    assert torch.equal(y.isnan(), plain.isnan())
    assert torch.equal(y.isinf(), plain.isinf())
    torch.testing.assert_close(y, plain, equal_nan=True)


X, W, V = torch.zeros(2, 5, 6), torch.zeros(8, 6), torch.zeros(8)
BAD = {
    "features": (ValueError, {"x": torch.zeros(2, 7)}, ["x", "[2, 7]", "[..., 6]", "[8, 6]"]),
    "x is a number": (ValueError, {"x": torch.tensor(1.0)}, ["x", "[]", "[..., 6]"]),
    "weight not 2d": (ValueError, {"weight": torch.zeros(8, 6, 1)}, ["weight", "[8, 6, 1]", "[K, C]"]),
    "bias length": (ValueError, {"bias": torch.zeros(7)}, ["bias", "[7]", "[8]"]),
    "scale length": (ValueError, {"scale": torch.zeros(1)}, ["scale", "[1]", "[8]"]),
    "shift is 2d": (ValueError, {"shift": torch.zeros(1, 8)}, ["shift", "[1, 8]", "[8]"]),
    "residual": (ValueError, {"residual": torch.zeros(5, 8)}, ["residual", "[5, 8]", "[2, 5, 8]"]),
    "dtype mix": (TypeError, {"weight": W.double()}, ["weight", "torch.float64", "torch.float32"]),
    "shift dtype": (TypeError, {"shift": V.bfloat16()}, ["shift", "torch.bfloat16", "torch.float32"]),
    "integers": (TypeError, {"x": X.int(), "weight": W.int()}, ["x", "torch.int32", "floating-point"]),
    "act": (ValueError, {"act": "GELU"}, ["'GELU'", "gelu_tanh"]),
    "device": (ValueError, {"weight": W.to("meta")}, ["weight", "meta", "cpu"]),
    "norm_eps": (ValueError, {"norm_eps": -1.0}, ["norm_eps", "-1.0", "at least 0"]),
    "channels": (
        ValueError,
        {
            "x": torch.empty(1, 2**31, device="meta"),
            "weight": torch.empty(1, 2**31, device="meta"),
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
        linear(**{"x": X, "weight": W, "bias": V, **change})
    for word in words:
        assert word in str(caught.value)


def full_arguments(batch=2):
    return torch.randn(batch, 5, 6), torch.randn(8, 6), torch.randn(8), torch.randn(batch, 5, 8)


def full_call(x, weight, vector, residual):
    return linear(x, weight, vector, residual, vector, vector, act="gelu")


@pytest.mark.parametrize("case", ["full", "bare slice", "empty"])
def test_opcheck(case):
    x, weight, vector, residual = full_arguments(0 if case == "empty" else 2)
    terms = (vector, residual, vector, vector)
    if case == "bare slice":
        x, terms = torch.randn(2, 5, 12)[..., ::2], (None,) * 4
    arguments = (x, weight, *terms, "silu", "auto")
    checks = torch.library.opcheck(torch.ops.depthfuse.linear.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(full_call, backend=compiler, fullgraph=True)
    for batch in (2, 3):
        arguments = full_arguments(batch)
        assert torch.equal(compiled(*arguments), full_call(*arguments))


def test_export():
    class Net(torch.nn.Module):
        def forward(self, x, weight, vector, residual):
            return full_call(x, weight, vector, residual)

    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = ({0: batch}, None, None, {0: batch})
    program = torch.export.export(Net(), full_arguments(), dynamic_shapes=dynamic)
    assert "depthfuse.linear" in str(program.graph)
    for count in (2, 5):
        arguments = full_arguments(count)
        assert torch.equal(program.module()(*arguments), full_call(*arguments))


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (6,), (0, 6)])
def test_flops_as_plain_linear(shape):
    x, weight = torch.randn(shape), torch.randn(8, 6)
    with FlopCounterMode(display=False) as fused:
        linear(x, weight, torch.randn(8), act="relu")
    with FlopCounterMode(display=False) as plain:
        x.reshape(-1, 6) @ weight.T
    assert fused.get_total_flops() == plain.get_total_flops()


def test_no_autograd():
    x, weight, vector, residual = (t.requires_grad_() for t in full_arguments())
    y = full_call(x, weight, vector, residual)
    assert not y.requires_grad
    assert torch.equal(y, full_call(*(t.detach() for t in (x, weight, vector, residual))))


def test_explicit_triton_on_cpu_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="CUDA or ROCm device, and the device is cpu"):
        linear(X, W, backend="triton")


def test_auto_falls_back_and_logs_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="depthfuse.ops.backend"):
        for _ in range(3):
            assert torch.equal(linear(X, W), torch.zeros(2, 5, 8))
    assert len(caplog.records) == 1
    assert "reference" in caplog.text
