"""The fused modules where Triton is the backend: what they offer, and what they do with what a kernel does not take."""

import copy

import pytest
import torch

from depthfuse import ops
from depthfuse.fused.blocks import (
    FusedAttention,
    FusedDepthwisePointwise,
    FusedInvertedResidual,
    FusedMlp,
    FusedPoolLinear,
)
from depthfuse.fused.layers import FusedConv2d, FusedLinear
from depthfuse.ops import BackendError, backend

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")


@pytest.fixture
def triton_by_default(monkeypatch):
    """As on a GPU, where "auto" is Triton: here its interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def resolve(name, device):
        return ("triton" if name == "auto" else name), ""

    for owner in (ops, backend):
        monkeypatch.setattr(owner, "resolve_backend", resolve)


def attention(**options):
    return FusedAttention(torch.empty(0), heads=1, **{"backend": "auto", **options})


def mlp(channels=12, **options):
    hidden = 16
    w1, w2 = torch.randn(hidden, channels), torch.randn(channels, hidden)
    return FusedMlp(
        w1, torch.randn(hidden), w2, **{"act_inner": "gelu", "act": "none", "backend": "auto", **options}
    )


def inverted_residual(kernel=3):
    w1, w2, w3 = torch.randn(16, 8, 1, 1), torch.randn(16, 1, kernel, kernel), torch.randn(8, 16, 1, 1)
    options = {"stride": 1, "act_inner": "relu6", "act": "none", "backend": "auto"}
    return FusedInvertedResidual(w1, torch.randn(16), w2, torch.randn(16), w3, **options)


def depthwise_pointwise(outputs=8):
    w1, w2 = torch.randn(6, 1, 3, 3), torch.randn(outputs, 6, 1, 1)
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    return FusedDepthwisePointwise(w1, None, w2, **geometry, act_inner="relu", act="none", backend="auto")


def conv(groups=1, norm_eps=None):
    options = {"padding": (1, 1), "groups": groups, "norm_eps": norm_eps}
    return FusedConv2d(torch.randn(64, 64 // groups, 3, 3), **options)


BOTH, NONE = ["triton", "reference"], ["reference"]
LAYERED, LAYERS = ["triton", "layers", "reference"], ["layers", "reference"]
OFFERED = {  # module, input's shape -> what is offered
    "conv": (conv(), (1, 64, 5, 5), ["triton", "winograd", "reference"]),
    "conv with a norm": (conv(norm_eps=1e-6), (1, 64, 5, 5), NONE),
    "depthwise with a norm": (conv(64, 1e-6), (1, 64, 5, 5), BOTH),
    "linear": (FusedLinear(torch.randn(8, 6)), (2, 6), BOTH),
    "pool_linear": (FusedPoolLinear(torch.randn(8, 6), backend="auto"), (1, 6, 2, 2), BOTH),
    "attention": (attention(), (1, 197, 96), BOTH),
    "attention at 518 px": (attention(), (1, 1370, 96), NONE),
    "attention of narrow heads": (attention(), (1, 197, 48), NONE),
    "mlp": (mlp(), (2, 12), LAYERED),
    "wide mlp": (mlp(300), (2, 300), LAYERS),
    "inverted residual": (inverted_residual(), (1, 8, 5, 5), LAYERED),
    "inverted residual of 5x5": (inverted_residual(5), (1, 8, 5, 5), LAYERS),
    "depthwise_pointwise": (depthwise_pointwise(), (1, 6, 5, 5), LAYERED),
    "wide depthwise_pointwise": (depthwise_pointwise(257), (1, 6, 5, 5), LAYERS),
}


@pytest.mark.parametrize(("module", "shape", "names"), OFFERED.values(), ids=OFFERED)
def test_triton_is_offered_for_what_its_kernel_takes(module, shape, names, triton_by_default):
    assert module.candidates(shape) == names
    x = torch.randn(shape)
    for name in names:
        if x.numel() < 5000:  # the interpreter is slow
            module.use(name, shape)
            assert module.implementation() == name
            assert module(x).isfinite().all()
    with pytest.raises(ValueError, match="unknown implementation"):
        module.use("gemm", shape)
    module.use("plain", shape)


@pytest.mark.parametrize(("module", "shape", "_"), OFFERED.values(), ids=OFFERED)
def test_float64_is_for_the_reference(module, shape, _, triton_by_default):
    wide = copy.deepcopy(module).double()
    assert not {"triton", "winograd", "layers"} & set(wide.candidates(shape))
    assert wide.implementation() != "triton"
    wide.prepare(shape)
    small = (1, 9, *shape[2:]) if isinstance(module, FusedAttention) else shape
    assert wide(torch.randn(small, dtype=torch.float64)).dtype == torch.float64


def test_a_bound_module_falls_back_for_a_call_that_its_kernel_does_not_take(triton_by_default):
    """Bound to "triton" for short sequences, then called with a long one."""
    module = attention()
    module.use("triton", (1, 9, 96))
    x = torch.randn(1, 1025, 96)
    assert torch.equal(module(x), ops.attention_reference(x, 1, None).contiguous())
    assert module(x[:, :9]).isfinite().all()
    assert module.implementation() == "triton"


def test_a_bound_module_of_another_dtype_falls_back(triton_by_default):
    for module, shape in (
        (FusedLinear(torch.randn(8, 6)), (2, 6)),
        (mlp(), (2, 12)),
        (conv(), (1, 64, 3, 3)),
    ):
        module.use("triton", shape)
        with pytest.raises(
            TypeError, match="expected x's dtype torch.float64"
        ):  # of the op, and not of the backend
            module(torch.randn(shape, dtype=torch.float64))


def test_triton_by_name_does_not_fall_back(triton_by_default):
    module = attention(backend="triton")
    assert module.candidates((1, 9, 96)) == ["triton"]
    with pytest.raises(BackendError, match="FusedAttention: backend 'triton' does not take 1370 tokens"):
        module.candidates((1, 1370, 96))
    with pytest.raises(BackendError, match="attention: backend 'triton' does not take 1370 tokens"):
        module(torch.randn(1, 1370, 96))
    assert mlp(300, backend="triton").candidates((2, 300)) == ["layers"]
    with pytest.raises(BackendError, match="FusedMlp: backend 'triton' does not take dtype torch.float64"):
        mlp(backend="triton").double().candidates((2, 12))
