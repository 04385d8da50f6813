"""Make an op known to PyTorch: schema, shape inference, implementation and FLOP count, each given once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def declare(
    schema: str, *, fake: Callable[..., Tensor], run: Callable[..., Tensor], flops: Callable[..., int]
) -> None:
    """Declare an op of the namespace `depthfuse`, one that records no gradient.

    Args:
        schema: "name(arguments) -> Tensor", as `torch.library.define` takes it.
        fake: the schema's arguments -> an empty tensor of the result's shape and strides.
        run: the schema's arguments -> the result; for every device.
        flops: shapes in place of tensors, and `out_shape` -> floating-point operations, two a multiply-add.
    """
    name, parenthesis, rest = schema.partition("(")
    qualified = f"depthfuse::{name}"
    torch.library.define(qualified, parenthesis + rest)
    torch.library.register_fake(qualified, fake)
    # Skip the autograd keys: by default PyTorch would mark the output as requiring a gradient that nothing computes.
    torch.library.impl(qualified, "Autograd", torch.library.fallthrough_kernel)
    torch.library.impl(qualified, "CompositeExplicitAutograd", torch.no_grad()(run))
    register_flop_formula(getattr(torch.ops.depthfuse, name))(flops)
