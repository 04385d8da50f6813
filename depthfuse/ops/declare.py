"""Make an op known to PyTorch: schema, shape inference, implementations and FLOP count, each given once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from depthfuse.ops.backend import runs_triton
from depthfuse.ops.layouts import Layout
from depthfuse.ops.trust import distrust
from depthfuse.untrusted import is_out_of_memory

# {op: the same in PyTorch's own operations}, for programs that are exported: nobody else's engine knows the ops.
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {}


def declare(
    schema: str,
    *,
    values: Mapping[str, Any],
    bias: str = "bias",
    layout: Layout,
    check: Callable[..., list[int]],
    refusal: Callable[..., str | None],
    reference: Callable[..., Tensor],
    triton: Callable[..., Tensor],
    flops: Callable[..., int],
) -> None:
    """Declare an op of the namespace `depthfuse`, one that records no gradient.

    The functions take the schema's arguments by name, `backend` apart, and those that belong to a value (such as
    `Tail`) as that value.

    Args:
        schema: "name(arguments) -> Tensor", as `torch.library.define` takes it; the first argument is the input.
        values: {argument of the functions: NamedTuple of what the schema has by the names of its fields}.
        bias: which of the schema's arguments is the tail's bias.
        layout: of the result.
        check: raises for arguments that do not fit; returns the result's shape.
        refusal: what the Triton kernel does not take of a call that fits, in words, or None.
        reference: the op in plain PyTorch, in any layout.
        triton: the op by its kernel; never asked for an empty result.
        flops: the schema's arguments with shapes in place of tensors, and `out_shape` -> floating-point operations, two
            a multiply-add.
    """
    name, parenthesis, rest = schema.partition("(")
    names = re.findall(r"(\w+)(?:=\w+)?(?=[,)])", rest.partition(" ->")[0])
    defaults = dict.fromkeys(re.findall(r"(\w+)=None", rest))
    parts = {
        part: (kind, {field: bias if field == "bias" else field for field in kind._fields})
        for part, kind in values.items()
    }

    def gather(args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], str]:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        backend = given.pop("backend")
        for part, (kind, fields) in parts.items():
            own = {field: given.pop(argument) for field, argument in fields.items() if argument in given}
            given[part] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
        return given, backend

    def fake(*args, **kwargs) -> Tensor:
        call, _ = gather(args, kwargs)
        return layout.empty(check(**call), call[names[0]])

    def run(*args, **kwargs) -> Tensor:
        call, backend = gather(args, kwargs)
        x, shape = call[names[0]], check(**call)
        by_triton = runs_triton(name, backend, x, lambda: refusal(**call))
        if 0 in shape:
            return layout.empty(shape, x)
        if by_triton:
            try:
                return triton(**call)
            except Exception as error:  # the compiler and the driver raise what they like
                if backend == "triton" or is_out_of_memory(error):
                    raise
                line = (str(error) or repr(error)).splitlines()[0]
                distrust(name, x.dtype, x.device, f"{type(error).__name__}: {line}", x.shape)
        return layout.dense(reference(**call))

    def decomposed(*args, **kwargs) -> Tensor:
        call, _ = gather(args, kwargs)
        return reference(**call)

    qualified = f"depthfuse::{name}"
    torch.library.define(qualified, parenthesis + rest)
    torch.library.register_fake(qualified, fake)
    # Skip the autograd keys: by default PyTorch would mark the output as requiring a gradient that nothing computes.
    torch.library.impl(qualified, "Autograd", torch.library.fallthrough_kernel)
    torch.library.impl(qualified, "CompositeExplicitAutograd", torch.no_grad()(run))
    register_flop_formula(getattr(torch.ops.depthfuse, name))(flops)
    DECOMPOSITIONS[getattr(torch.ops.depthfuse, name).default] = decomposed
