"""What every op of `depthfuse.ops` keeps: PyTorch's tools take it, empty batches work, and its backends agree."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from depthfuse.ops import (
    BackendError,
    attention,
    backend,
    conv2d,
    depthwise_pointwise,
    inverted_residual,
    linear,
    mlp,
    pool_linear,
    winograd_conv2d,
)
from depthfuse.selftest.oracle import integers

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
from depthfuse.kernels.winograd import pack_weight


@dataclass(frozen=True)
class Example:
    """One call of an op. Shapes that start with None grow with the batch."""

    op: Any
    shapes: dict[str, tuple[int | None, ...]]
    options: dict[str, Any]
    too_large: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # shapes that its kernel does not take
    exact: bool = True  # whether small integers in give integers out, with nothing rounded
    prepare: dict[str, Callable[[Tensor], Tensor]] = field(
        default_factory=dict
    )  # what makes an argument of a tensor

    def tensors(self, batch: int = 2, make=integers, dtype=torch.float32, **changed) -> dict[str, Tensor]:
        shapes = (self.shapes | changed).items()
        return {k: make(tuple(batch if n is None else n for n in s), dtype) for k, s in shapes}

    def __call__(self, tensors: dict[str, Tensor], **more) -> Tensor:
        prepared = {k: self.prepare[k](t) if k in self.prepare else t for k, t in tensors.items()}
        return self.op(**prepared, **self.options, **more)


TAIL = {"scale": (8,), "shift": (8,)}
IMAGE = {"bias": (8,), "residual": (None, 8, 5, 7), **TAIL}
ROWS = {"residual": (None, 3, 8), **TAIL}
EXAMPLES = {
    "conv2d": Example(
        conv2d,
        {"x": (None, 6, 5, 7), "weight": (8, 6, 3, 3), **IMAGE},
        {"padding": 1, "act": "relu"},
    ),
    "conv2d, depthwise": Example(
        conv2d,
        {"x": (None, 8, 5, 7), "weight": (8, 1, 3, 3), **IMAGE},
        {"padding": 1, "groups": 8, "act": "relu6"},
    ),
    "conv2d, depthwise and norm": Example(
        conv2d,
        {"x": (None, 8, 5, 7), "weight": (8, 1, 3, 3), **IMAGE},
        {"padding": 1, "groups": 8, "norm_eps": 1e-6},
        {"x": (2, 16, 5, 7), "weight": (8, 2, 3, 3)},
        exact=False,
    ),
    "linear": Example(linear, {"x": (None, 3, 12), "weight": (8, 12), "bias": (8,), **ROWS}, {"act": "relu"}),
    "linear, norm": Example(
        linear,
        {"x": (None, 3, 12), "weight": (8, 12), "bias": (8,), **ROWS},
        {"norm_eps": 1e-6},
        exact=False,
    ),
    "inverted_residual": Example(
        inverted_residual,
        {
            "x": (None, 8, 5, 7),
            "w1": (16, 8, 1, 1),
            "b1": (16,),
            "w2": (16, 1, 3, 3),
            "b2": (16,),
            "w3": (8, 16, 1, 1),
            "b3": (8,),
            "residual": (None, 8, 5, 7),
            **TAIL,
        },
        {"act_inner": "relu"},
        {"w2": (16, 1, 5, 5)},
    ),
    "mlp": Example(
        mlp,
        {"x": (None, 3, 12), "w1": (16, 12), "b1": (16,), "w2": (8, 16), "b2": (8,), **ROWS},
        {"act_inner": "relu"},
        {"x": (2, 3, 300), "w1": (16, 300)},
    ),
    "mlp, norm": Example(
        mlp,
        {"x": (None, 3, 12), "w1": (16, 12), "b1": (16,), "w2": (8, 16), "b2": (8,), **ROWS},
        {"act_inner": "gelu", "norm_eps": 1e-6},
        exact=False,
    ),
    "depthwise_pointwise": Example(
        depthwise_pointwise,
        {
            "x": (None, 6, 5, 7),
            "w1": (6, 1, 3, 3),
            "b1": (6,),
            "w2": (8, 6, 1, 1),
            "b2": (8,),
            "residual": (None, 8, 5, 7),
            **TAIL,
        },
        {"padding": 1, "act_inner": "relu"},
        {"w2": (257, 6, 1, 1), "b2": (257,), "residual": (2, 257, 5, 7), "scale": (257,), "shift": (257,)},
    ),
    "pool_linear": Example(
        pool_linear, {"x": (None, 12, 4, 2), "weight": (8, 12), "bias": (8,)}, {}, exact=False
    ),
    "pool_linear, norm": Example(
        pool_linear,
        {"x": (None, 12, 4, 2), "weight": (8, 12), "bias": (8,)},
        {"norm_eps": 1e-6},
        exact=False,
    ),
    "winograd_conv2d": Example(
        winograd_conv2d,
        {"x": (None, 6, 5, 7), "packed": (8, 6, 3, 3), **IMAGE},
        {"padding": 1, "act": "relu"},
        prepare={"packed": lambda weight: pack_weight(4 * weight)},  # times 4: integers stay integers
    ),
    "attention": Example(
        attention, {"qkv": (None, 9, 192)}, {"heads": 2}, {"qkv": (1, 1025, 96)}, exact=False
    ),
}
REFUSED = {name: example for name, example in EXAMPLES.items() if example.too_large}
# Compiled on the GPU where there is one (marked `gpu`), in Triton's interpreter on the CPU where there is none.
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


def noise(shape, dtype):
    return torch.randn(shape).to(dtype)


@pytest.fixture(params=EXAMPLES.values(), ids=EXAMPLES)
def example(request) -> Example:
    return request.param


@pytest.mark.parametrize("batch", [2, 0])
def test_opcheck(example, batch):
    checks = torch.library.opcheck(
        getattr(torch.ops.depthfuse, example.op.__name__).default,
        *schema_arguments(example, example.tensors(batch, noise)),
    )
    assert set(checks.values()) == {"SUCCESS"}


def schema_arguments(example, tensors) -> tuple[tuple, dict]:
    """The arguments of the op itself that the Python function calls it with."""
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "depthfuse":
                seen.append((args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        example(tensors)
    (call,) = seen
    return call


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(example, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tensors: example(tensors) + 1, backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for batch in (2, 3):
        tensors = example.tensors(batch)
        y, plain = compiled(tensors), example(tensors) + 1
        assert torch.equal(y, plain)
        assert y.stride() == plain.stride()


def test_export(example):
    class Net(torch.nn.Module):
        def forward(self, tensors):
            return example(tensors)

    batch = torch.export.Dim("batch", min=1, max=64)
    growing = {k: {0: batch} if s[0] is None else None for k, s in example.shapes.items()}
    program = torch.export.export(Net(), (example.tensors(),), dynamic_shapes=(growing,))
    assert f"depthfuse.{example.op.__name__}" in str(program.graph)
    for count in (2, 5):
        tensors = example.tensors(count)
        assert torch.equal(program.module()(tensors), example(tensors))


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_shape_and_strides_are_those_that_were_inferred(example, device, dtype, name):
    for batch in (0, 1, 2):
        tensors = {k: t.to(device) for k, t in example.tensors(batch, dtype=dtype).items()}
        y = example(tensors, backend=name)
        with FakeTensorMode() as mode:
            fake = example({k: mode.from_tensor(t) for k, t in tensors.items()}, backend=name)
        assert (y.shape, y.stride(), y.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_triton_gives_what_the_reference_gives(example, device, dtype):
    for batch in (1, 3):
        tensors = {k: t.to(device) for k, t in example.tensors(batch, dtype=dtype).items()}
        given = {k: any_layout(t) for k, t in tensors.items()}
        y = example(given, backend="triton")
        exact = example({k: t.double() for k, t in tensors.items()}, backend="reference")
        if example.exact:
            assert torch.equal(y, exact.to(dtype))
        else:
            # The kernels' own tests bound their rounding. Mistaken arguments are off by the values themselves, not by
            # half of their digits.
            half = torch.finfo(dtype).eps ** 0.5
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=half * exact.abs().max().item())
        for name, tensor in tensors.items():
            assert torch.equal(given[name], tensor), f"{name} was written to"


def any_layout(tensor: Tensor) -> Tensor:
    """The same values behind other strides, with NaN between them."""
    big = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return big[..., 0].copy_(tensor)


def test_no_autograd(example):
    tensors = example.tensors(make=noise)
    expected = example(tensors)
    y = example({k: t.requires_grad_() for k, t in tensors.items()})
    assert not y.requires_grad
    assert torch.equal(y, expected)


def test_triton_on_a_cpu_without_the_interpreter_says_why(example, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for batch in (2, 0):
        with pytest.raises(BackendError, match="CUDA or ROCm device, and the device is cpu"):
            example(example.tensors(batch), backend="triton")


@pytest.mark.parametrize("example", REFUSED.values(), ids=REFUSED)
def test_a_shape_that_the_kernel_does_not_take(example, monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "_logged", set())
    tensors = example.tensors(**example.too_large)
    with pytest.raises(BackendError, match=f"{example.op.__name__}: backend 'triton' does not take"):
        example(tensors, backend="triton")
    expected = example(tensors, backend="reference")
    # as on a GPU, where "auto" is Triton
    monkeypatch.setattr(backend, "resolve_backend", lambda *_: ("triton", ""))
    with caplog.at_level(logging.INFO, logger="depthfuse.ops.backend"):
        for _ in range(2):
            assert torch.equal(example(tensors), expected)
    assert len(caplog.records) == 1
    assert example.op.__name__ in caplog.text


def test_float64_is_for_the_reference(example, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tensors = example.tensors(dtype=torch.float64)
    with pytest.raises(BackendError, match="does not take dtype torch.float64"):
        example(tensors, backend="triton")
    monkeypatch.setattr(backend, "resolve_backend", lambda *_: ("triton", ""))
    assert example(tensors).dtype == torch.float64


@pytest.mark.skipif(torch.cuda.is_available(), reason="only Triton's interpreter multiplies bfloat16 wrongly")
def test_bfloat16_products_are_not_for_the_interpreter(example, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tensors = example.tensors(dtype=torch.bfloat16)
    if example.options.get("groups") == 8:  # depthwise: there is no product
        assert example(tensors, backend="triton").dtype == torch.bfloat16
        return
    with pytest.raises(BackendError, match="does not take bfloat16 in Triton's interpreter"):
        example(tensors, backend="triton")
