"""The ways to compute a case (see cases.py) that the microbenchmarks compare.

Each is a function of the case and of some sets of operands, and gives a call of no arguments for each set. Whatever a
user prepares once, such as packed weights or compiled code, is prepared here and not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kernels.cases import NORM_EPS, Case
from depthfuse import ops
from depthfuse.fused.layers import FusedConv2d, FusedLinear
from depthfuse.ops import onednn

Operands = dict[str, Tensor | None]
Call = Callable[[], Tensor]

# What an operator is given at every call; all else is weights, known beforehand.
ACTIVATIONS_IN = ("x", "residual", "qkv")


class Unavailable(Exception):
    """This contender does not exist for this case here; the message says why."""


def eager(case: Case, sets: list[Operands]) -> list[Call]:
    """PyTorch's own functions, one after another."""
    return [functools.partial(case.eager, **operands) for operands in sets]


class _Frozen(nn.Module):
    """A case with its weights as buffers, which torch.compile may then pack."""

    def __init__(self, case: Case, operands: Operands) -> None:
        super().__init__()
        self.case = case
        self.names = [name for name in operands if name not in ACTIVATIONS_IN]
        for name in self.names:
            self.register_buffer(name, operands[name])

    def forward(self, **given: Tensor | None) -> Tensor:
        return self.case.eager(**given, **{name: getattr(self, name) for name in self.names})


def compiled(case: Case, sets: list[Operands]) -> list[Call]:
    """torch.compile: with max-autotune on a GPU, with frozen weights on a CPU."""
    torch._dynamo.reset()  # the cases share code, and PyTorch gives up on code that it compiled too often
    if _device(sets).type == "cuda":
        # no graphs of its own: all contenders are captured alike
        run = torch.compile(case.eager, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
        return [functools.partial(run, **operands) for operands in sets]
    from torch._inductor import config

    (operands,) = sets
    run = torch.compile(_Frozen(case, operands).eval(), fullgraph=True, dynamic=False)
    given = {name: tensor for name, tensor in operands.items() if name in ACTIVATIONS_IN}
    with config.patch(freezing=True), torch.inference_mode():
        run(**given)
    return [functools.partial(run, **given)]


def vendor(case: Any, sets: list[Operands]) -> list[Call]:
    """The vendor's fused call: cuDNN's or MIOpen's, on a CPU oneDNN's with packed weights.

    What it cannot take in, such as the affine after the activation, follows as a step of its own.
    """
    device = _device(sets)
    if device.type == "cpu":
        if not onednn.available(next(iter(sets[0].values())).dtype):
            raise Unavailable("oneDNN has no fused ops in this dtype here")
        if case.op == "attention" or (case.op == "depthwise_conv2d" and case.norm):
            raise Unavailable("no fused call of oneDNN")
        return [_bound(case, operands, "onednn") for operands in sets]
    if case.op in ("conv2d", "depthwise_conv2d"):
        return [_vendor_convolution(case, operands) for operands in sets]
    if case.op == "attention" and torch.version.hip is None:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if sets[0]["qkv"].dtype == torch.float32:
            raise Unavailable("cuDNN has no attention in float32")

        def run(operands: Operands) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return case.eager(**operands)

        return [functools.partial(run, operands) for operands in sets]
    raise Unavailable("no fused call of the vendor")


def _vendor_convolution(case: Any, operands: Operands) -> Call:
    if case.act != "relu" or getattr(case, "norm", False):
        raise Unavailable("cuDNN and MIOpen fuse no activation but ReLU")
    prefix = "cudnn" if torch.version.hip is None else "miopen"
    x, weight, bias, residual, scale, shift = operands.values()
    groups = x.shape[1] // weight.shape[1]
    geometry = ((case.stride,) * 2, (case.padding,) * 2, (1, 1), groups)
    weight = weight.contiguous(memory_format=torch.channels_last)
    plain = getattr(torch, f"{prefix}_convolution_relu")
    added = getattr(torch, f"{prefix}_convolution_add_relu")
    affine = None if scale is None else (scale.view(-1, 1, 1), shift.view(-1, 1, 1))

    def run() -> Tensor:
        if residual is None:
            y = plain(x, weight, bias, *geometry)
        else:
            y = added(x, weight, residual, 1.0, bias, *geometry)
        return y if affine is None else torch.addcmul(affine[1], y, affine[0])

    return run


def ours(case: Case, sets: list[Operands]) -> list[Call]:
    """The Triton kernel on a GPU; on a CPU the fused modules, bound to the implementation that is usually best."""
    if _device(sets).type == "cuda":
        return [functools.partial(case.ours, **operands) for operands in sets]
    return [_bound(case, operands, None) for operands in sets]


def native(case: Any, sets: list[Operands]) -> list[Call]:
    """The kernel of csrc/gpu, for HIP and CUDA."""
    from depthfuse.kernels.arguments import Tail, ThreeLayers
    from depthfuse.native import gpu
    from depthfuse.native.building import Missing

    if case.op != "inverted_residual":
        raise Unavailable("csrc/gpu has no such operator")
    if _device(sets).type == "cpu":
        raise Unavailable("on a CPU it is for tests alone")

    def bound(x: Tensor, w1, b1, w2, b2, w3, b3, residual) -> Call:
        packed = gpu.pack(ThreeLayers(w1, b1, w2, b2, w3))
        options = {"stride": case.stride, "act_inner": case.act}
        return functools.partial(gpu.inverted_residual, x, packed, Tail(b3, residual), **options)

    try:
        calls = [bound(**operands) for operands in sets]
        calls[0]()
    except (Missing, ValueError) as reason:
        raise Unavailable(str(reason)) from reason
    return calls


CONTENDERS: dict[str, Callable[[Case, list[Operands]], list[Call]]] = {
    "ours": ours,
    "eager": eager,
    "compile": compiled,
    "vendor": vendor,
    "native": native,
}


def _device(sets: list[Operands]) -> torch.device:
    return next(iter(sets[0].values())).device


def _bound(case: Any, operands: Operands, implementation: str | None) -> Call:
    """The case as modules of `depthfuse.fused.layers`, each bound to `implementation`, or to its usual best (None)."""

    def bind(module: FusedConv2d | FusedLinear, x: Tensor) -> FusedConv2d | FusedLinear:
        if implementation is None:
            module.prepare(x.shape)
        elif implementation in module.candidates(x.shape):
            module.use(implementation, x.shape)
        else:
            raise Unavailable(f"{implementation} cannot run this layer")
        return module

    return CPU_BUILDERS[case.op](case, bind, **operands)


def _convolution(case: Any, bind, x, weight, bias, residual, scale, shift) -> Call:
    geometry = {"stride": (case.stride,) * 2, "padding": (case.padding,) * 2}
    groups = x.shape[1] // weight.shape[1]
    if getattr(case, "norm", False):
        tail = (bias, residual, scale, shift)
        options = geometry | {"groups": groups, "act": case.act, "norm_eps": NORM_EPS}
        return functools.partial(ops.conv2d, x, weight, *tail, **options)
    layer = FusedConv2d(weight, bias, scale, shift, **geometry, groups=groups, act=case.act)
    return functools.partial(bind(layer, x), x, residual)


def _linear(case: Any, bind, x, weight, bias, residual, scale, shift) -> Call:
    layer = bind(FusedLinear(weight, bias, scale, shift, act=case.act), x)
    return lambda: layer(_normalized(x, case.norm), residual)


def _mlp(case: Any, bind, x, w1, b1, w2, b2, residual) -> Call:
    first = bind(FusedLinear(w1, b1, act="gelu"), x)
    second = bind(FusedLinear(w2, b2), first(x))
    return lambda: second(first(_normalized(x, case.norm)), residual)


def _inverted_residual(case: Any, bind, x, w1, b1, w2, b2, w3, b3, residual) -> Call:
    expand = bind(FusedConv2d(w1, b1, act=case.act), x)
    stride = (case.stride,) * 2
    depthwise = FusedConv2d(w2, b2, stride=stride, padding=(1, 1), groups=len(w2), act=case.act)
    bind(depthwise, expand(x))
    project = bind(FusedConv2d(w3, b3), depthwise(expand(x)))
    return lambda: project(depthwise(expand(x)), residual)


def _depthwise_pointwise(case: Any, bind, x, w1, b1, w2, b2, residual, scale, shift) -> Call:
    padding = (case.kernel // 2,) * 2
    first = bind(FusedConv2d(w1, b1, padding=padding, groups=len(w1), act=case.act_inner), x)
    second = bind(FusedConv2d(w2, b2, scale, shift, act=case.act), first(x))
    return lambda: second(first(x), residual)


def _pool_linear(case: Any, bind, x, weight, bias) -> Call:
    layer = bind(FusedLinear(weight, bias), x.mean((2, 3)))
    return lambda: layer(_normalized(x.mean((2, 3)), case.norm))


def _attention(case: Any, bind, qkv) -> Call:
    return functools.partial(ops.attention, qkv, case.heads)


def _normalized(x: Tensor, norm: bool) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) if norm else x


# How the fused modules compute each operator on a CPU. Winograd's is missing: there oneDNN decides.
CPU_BUILDERS: dict[str, Callable[..., Call]] = {
    "conv2d": _convolution,
    "depthwise_conv2d": _convolution,
    "linear": _linear,
    "mlp": _mlp,
    "inverted_residual": _inverted_residual,
    "depthwise_pointwise": _depthwise_pointwise,
    "pool_linear": _pool_linear,
    "attention": _attention,
}
