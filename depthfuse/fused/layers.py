"""Autograd-free modules that stand for whole conv or linear chains: bias, residual, activation, affine in one call.

They hold buffers, not parameters. The plain weight is a buffer, so `state_dict` saves and rebuilds them and `.to(...)`
moves them. What is derived from it for one CPU implementation (packed weights) is never saved, and dropped whenever
the plain weight changes: `prepare` or `use` makes it anew.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse import ops
from depthfuse.kernels.arguments import Tail, Window
from depthfuse.ops import cpu
from depthfuse.ops.activations import activation
from depthfuse.ops.backend import dtype_refusal, product_refusal, refused
from depthfuse.ops.conv2d import check_arguments as check_conv2d
from depthfuse.ops.conv2d import refusal as conv2d_refusal
from depthfuse.ops.linear import check_arguments as check_linear
from depthfuse.ops.trust import distrusted

_local = threading.local()


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """Within it (in this thread) the fused modules run the plain ops, which propagate NaN through every activation."""
    before = getattr(_local, "plain", False)
    _local.plain = True
    try:
        yield
    finally:
        _local.plain = before


def _drop_packed(module: FusedModule, _incompatible_keys: object) -> None:
    # A function with a name, not a lambda: modules that hold a lambda cannot be pickled.
    module._unbind()


class FusedModule(nn.Module):
    """What stands in a plan for several layers: tensors, a description in plain values, and implementations to choose.

    A subclass passes its tensors on by the names of its constructor's arguments and gives the other arguments in
    `config`, so that `type(m)(**m.tensors(), **m.config())` is the same module again. Its `forward` takes tensors.
    """

    op = ""  # of `depthfuse.ops`, which computes it

    def __init__(self, backend: str, **tensors: Tensor | None) -> None:
        super().__init__()
        self.backend = backend
        self._tensor_names = tuple(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, None if value is None else self._own(value))
        self._unbind()
        self.register_load_state_dict_post_hook(_drop_packed)
        self.eval()

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy, in the layout that this module's implementations read."""
        return tensor.detach().clone()

    def tensors(self) -> dict[str, Tensor | None]:
        """The constructor's tensor arguments."""
        return {name: getattr(self, name) for name in self._tensor_names}

    def config(self) -> dict[str, Any]:
        """The constructor's other arguments: numbers, strings and lists of them, fit for JSON."""
        raise NotImplementedError

    def signature(self) -> dict[str, Any]:
        """All that the speed of this module depends on, its inputs apart; fit for JSON."""
        shapes = {name: None if t is None else list(t.shape) for name, t in self.tensors().items()}
        dtype = str(next(self.buffers()).dtype).removeprefix("torch.")
        return {"module": type(self).__name__, "config": self.config(), "tensors": shapes, "dtype": dtype}

    def _unbind(self) -> None:
        self._runner: Callable[..., Tensor] | None = None
        self._packed: Tensor | None = None
        self._bound: str | None = None

    def _apply(self, fn, recurse: bool = True):
        self._unbind()
        return super()._apply(fn, recurse)

    def __getstate__(self):
        # Packed weights are opaque: they can neither be copied nor saved.
        return {**super().__getstate__(), "_runner": None, "_packed": None, "_bound": None}

    def _runs_bound(self, x: Tensor) -> bool:
        return (
            self._runner is not None
            and x.numel() > 0
            and not getattr(_local, "plain", False)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def _resolved(self) -> tuple[str, bool]:
        """The backend of the unbound module, and whether that is the reference on a CPU."""
        buffer = next(self.buffers())
        name, _ = ops.resolve_backend(self.backend, buffer.device)
        if self.backend == "auto" and dtype_refusal(buffer.dtype):
            name = "reference"
        return name, name == "reference" and buffer.device.type == "cpu"

    def _op_backend(self) -> str:
        """What to pass to the op as its backend. Bound to "triton" by a choice of ours it may still fall back, for a
        call that the kernel does not take.
        """
        return "reference" if self._bound == "reference" else self.backend

    def _refusal(self, x: Tensor) -> str | None:
        """What the Triton kernel does not take of this module on `x`, its dtype apart, in words, or None."""
        return product_refusal(x.dtype)

    def candidates(self, input_size: Sequence[int] | None = None) -> list[str]:
        """The implementations that can run this module where it is, the usual best first.

        On a CPU those of `depthfuse.ops.cpu`; on a GPU those of Triton, and "reference", which is the vendor's library.

        Args:
            input_size: the shape of x; None where it is not known yet, which refuses no shape.

        Raises:
            BackendError: the backend is "triton", by name, and no kernel takes this module on such an input.
        """
        name, on_cpu = self._resolved()
        if on_cpu:
            return self._cpu_candidates()
        if name != "triton":
            return [name]
        like = next(self.buffers())
        dtype, shape = like.dtype, torch.Size(input_size or ())
        ours, what = self._triton_candidates(), dtype_refusal(dtype)
        if what is not None:
            ours = []
        elif what := distrusted(self.op, dtype, like.device, shape):
            ours = [name for name in ours if name != "triton"]
        elif what := self._refusal(torch.empty(input_size or (), dtype=dtype, device="meta")):
            ours = [name for name in ours if name == "layers"]  # whose kernels are others
        if self.backend == "auto":
            return [*ours, "reference"]
        if not ours:
            raise refused(type(self).__name__, what)
        return ours

    def use(self, name: str, input_size: Sequence[int]) -> None:
        """Bind the implementation `name`, one of `candidates()` or "plain", which is none of them.

        Args:
            input_size: the shape of x for which packed weights are laid out; they are right for any other.

        Raises:
            ValueError: an unknown implementation.
        """
        names = list(dict.fromkeys([*self.candidates(input_size), "plain"]))
        if name not in names:
            raise ValueError(f"unknown implementation {name!r}; expected one of {', '.join(names)}")
        self._unbind()
        if name == "plain":
            return
        backend, on_cpu = self._resolved()
        if on_cpu:
            self._runner = self._bind_cpu(name, input_size)
        elif backend == "triton" and name != "reference":
            self._packed = self._pack(name)
        self._bound = name

    def prepare(self, input_size: Sequence[int]) -> None:
        """Bind the implementation that is usually best; `depthfuse.accelerate` measures instead."""
        self.use(self.candidates(input_size)[0], input_size)

    def _cpu_candidates(self) -> list[str]:
        return ["plain"]

    def _bind_cpu(self, name: str, input_size: Sequence[int]) -> Callable[..., Tensor] | None:
        """What computes the implementation `name`; None for the op itself."""
        raise NotImplementedError

    def _triton_candidates(self) -> list[str]:
        return ["triton"]

    def _pack(self, name: str) -> Tensor | None:
        """The weight as the Triton kernel of implementation `name` reads it fastest; None for as it is."""
        return None

    def swallows_nan(self) -> bool:
        """Whether the bound implementation turns NaN into a number."""
        return False

    def implementation(self) -> str:
        """What runs this module: "triton" or "reference", or on a CPU one of `depthfuse.ops.cpu`."""
        name, on_cpu = self._resolved()
        return self._bound or ("plain" if on_cpu else name)

    def epilogue(self) -> str:
        """What is fused behind the product, in words."""
        return "none"

    def extra_repr(self) -> str:
        return f"implementation={self.implementation()!r}, epilogue={self.epilogue()!r}"


class _FusedProduct(FusedModule):
    """A convolution or linear layer with its epilogue."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self, weight, bias, scale, shift, act: str, backend: str, norm_eps: float | None = None
    ) -> None:
        activation(act)
        super().__init__(backend, weight=weight, bias=bias, scale=scale, shift=shift)
        self.act = act
        self.norm_eps = norm_eps

    def _tail(self, residual: Tensor | None) -> Tail:
        return Tail(self.bias, residual, self.scale, self.shift, self.act)

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        raise NotImplementedError

    def _run_bound(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None and residual.dtype != self.weight.dtype:
            self._check(x, residual)
        assert self._runner is not None
        try:
            with torch.no_grad():  # an input that requires a gradient must not make this record one
                return self._runner(x, residual)
        except RuntimeError:
            self._check(x, residual)  # says what does not fit; if all does, it is another error
            raise

    def swallows_nan(self) -> bool:
        return self._bound == "onednn" and self.act in cpu.SWALLOWS_NAN

    def epilogue(self) -> str:
        parts = ["LayerNorm"] if self.norm_eps is not None else []
        parts += ["bias"] if self.bias is not None else []
        parts += [self.act] if self.act != "none" else []
        parts += ["affine"] if self.scale is not None or self.shift is not None else []
        return " + ".join(parts) or "none"


class FusedConv2d(_FusedProduct):
    """scale * act(norm(conv2d(x, weight) + bias) + residual) + shift. Depthwise where groups equals the channels.

    Args:
        weight: [K, C / groups, R, S]. bias, scale, shift: [K] or None. All of one dtype, on one device.
        stride, padding, dilation: (height, width).
        act, norm_eps, backend: see `depthfuse.ops.conv2d`.
    """

    op = "conv2d"
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        act: str = "none",
        norm_eps: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(weight, bias, scale, shift, act, backend, norm_eps)
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups

    def _own(self, tensor: Tensor) -> Tensor:
        given = tensor.detach()
        dense = given.contiguous(memory_format=torch.channels_last) if given.dim() == 4 else given
        return given.clone() if dense is given else dense  # one copy, not two

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, act="none", scale=None, shift=None, backend="auto") -> FusedConv2d:
        """From an nn.Conv2d, which is left alone. Raises ValueError unless its padding is zeros, in numbers."""
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"expected a convolution with zero padding in numbers, got {conv}")
        return cls(
            conv.weight,
            conv.bias,
            scale,
            shift,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            act=act,
            backend=backend,
        )

    def config(self) -> dict[str, Any]:
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        rest = {"act": self.act, "norm_eps": self.norm_eps, "backend": self.backend}
        return {**geometry, "groups": self.groups, **rest}

    def _cpu_candidates(self) -> list[str]:
        if self.norm_eps is not None:
            return ["plain"]
        return cpu.conv2d_candidates(self.weight, self.padding, self.groups)

    def _refusal(self, x: Tensor) -> str | None:
        return conv2d_refusal(x, self.weight, self._tail(None), self._window(), self.norm_eps)

    def _triton_candidates(self) -> list[str]:
        from depthfuse.kernels import winograd

        kernel, stride, dilation = tuple(self.weight.shape[2:]), tuple(self.stride), tuple(self.dilation)
        suits = self.norm_eps is None and winograd.supports(kernel, stride, dilation, self.groups)
        # With few channels on either side it is loads that limit a convolution, not the products that Winograd saves.
        return ["triton", "winograd"] if suits and min(self.weight.shape[:2]) >= 64 else ["triton"]

    def _pack(self, name: str) -> Tensor:
        from depthfuse.kernels import conv2d, depthwise, winograd

        if name == "winograd":
            return winograd.pack_weight(self.weight)
        is_depthwise = self.groups > 1 and self.weight.shape[:2] == (self.groups, 1)
        return (depthwise if is_depthwise else conv2d).pack_weight(self.weight)

    def _bind_cpu(self, name: str, input_size: Sequence[int]) -> cpu.Runner:
        return cpu.bind_conv2d(name, self.weight, self._tail(None), self._window(), input_size)

    def _window(self) -> Window:
        return Window(self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; residual: [N, K, P, Q] or None. Returns [N, K, P, Q] in channels_last."""
        if self._runs_bound(x):
            if (
                x.dim() != 4
                or x.shape[1] != self.weight.shape[1] * self.groups
                or x.dtype != self.weight.dtype
            ):
                self._check(x, residual)
            y = self._run_bound(x, residual)
            if residual is not None and residual.shape != y.shape:
                self._check(x, residual)
            return y
        tail, window = self._tail(residual), self._window()
        if torch.jit.is_tracing():  # what TorchScript knows how to fuse
            return ops.conv2d_reference(x, self.weight, tail, window, self.norm_eps)
        weight = self.weight if self._packed is None else self._packed
        options = (self.act, self._op_backend())
        if self._bound == "winograd":
            return torch.ops.depthfuse.winograd_conv2d(x, weight, *tail[:4], self.padding, *options)
        return torch.ops.depthfuse.conv2d(x, weight, *tail[:4], *window, *options, self.norm_eps)

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        check_conv2d(x, self.weight, self._tail(residual), self._window(), self.norm_eps)

    def extra_repr(self) -> str:
        filters, group_channels, *kernel = self.weight.shape
        return (
            f"{group_channels * self.groups}, {filters}, kernel_size={tuple(kernel)}, "
            f"stride={tuple(self.stride)}, padding={tuple(self.padding)}, groups={self.groups}, "
            f"{super().extra_repr()}"
        )


class FusedLinear(_FusedProduct):
    """scale * act(norm(x) @ weight.T + bias + residual) + shift over the last axis.

    Args:
        weight: [K, C]. bias, scale, shift: [K] or None. All of one dtype, on one device.
        act, norm_eps, backend: see `depthfuse.ops.linear`.
    """

    op = "linear"

    def __init__(
        self, weight, bias=None, scale=None, shift=None, *, act="none", norm_eps=None, backend="auto"
    ) -> None:
        super().__init__(weight.contiguous(), bias, scale, shift, act, backend, norm_eps)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, act="none", scale=None, shift=None, backend="auto"
    ) -> FusedLinear:
        """From an nn.Linear, which is left alone."""
        return cls(linear.weight, linear.bias, scale, shift, act=act, backend=backend)

    def config(self) -> dict[str, Any]:
        return {"act": self.act, "norm_eps": self.norm_eps, "backend": self.backend}

    def _cpu_candidates(self) -> list[str]:
        return ["plain"] if self.norm_eps is not None else cpu.linear_candidates(self.weight)

    def _bind_cpu(self, name: str, input_size: Sequence[int]) -> cpu.Runner:
        return cpu.bind_linear(name, self.weight, self._tail(None), input_size)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [..., C]; residual: [..., K] or None. Returns [..., K]."""
        if self._runs_bound(x):
            if x.dtype != self.weight.dtype or x.shape[-1] != self.weight.shape[1]:
                self._check(x, residual)
            if residual is not None and residual.shape != (*x.shape[:-1], self.weight.shape[0]):
                self._check(x, residual)
            return self._run_bound(x, residual)
        tail = self._tail(residual)
        if torch.jit.is_tracing():
            return ops.linear_reference(x, self.weight, tail, self.norm_eps)
        options = (self.act, self._op_backend(), self.norm_eps)
        return torch.ops.depthfuse.linear(x, self.weight, *tail[:4], *options)

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        check_linear(x, self.weight, self._tail(residual), self.norm_eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {super().extra_repr()}"
