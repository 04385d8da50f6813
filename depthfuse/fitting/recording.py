"""What a block of a running net is given and gives."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.errors import FitError
from depthfuse.merging.adapters.layers import ACTIVATIONS
from depthfuse.merging.merged_blocks import first_of


@dataclass
class Call:
    """One call of a block. before_act: the input of the activation that the block ends in, if it does."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    before_act: Tensor | None

    @property
    def bytes(self) -> int:
        tensors = [*self.args, *self.kwargs.values(), self.output, self.before_act]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class _Seen(Exception):
    """Ends a forward pass when what is to be seen has been seen."""


_MOST_BYTES = 2**31  # of the inputs and outputs of a block that are kept


@torch.no_grad()
def record(net: nn.Module, path: str, batches: Iterable[Tensor]) -> list[Call]:
    """The calls of the module at `path` while `net` sees each batch [N, C, H, W]; what comes after it is not run.

    Two batches at least, and of the others as many as fit into 2 GiB. Raises FitError where the net does not call the
    module.
    """
    block = net.get_submodule(path)
    calls: list[Call] = []
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    activated: list[tuple[Tensor, Tensor]] = []

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        activated.clear()
        # copies, as a block may write over its input
        given.append((tuple(a.clone() if isinstance(a, Tensor) else a for a in args), kwargs))

    def before_act(_act: nn.Module, args: tuple[Any, ...]) -> None:
        activated.append((args[0].clone(), args[0]))

    def after_act(_act: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        activated[-1] = activated[-1][0], output

    def after(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        tensor = first_of(output)
        last = activated[-1] if activated else None
        calls.append(Call(*given.pop(), tensor.clone(), last[0] if last and last[1] is tensor else None))
        raise _Seen

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    ]
    for module in block.modules():
        if isinstance(module, ACTIVATIONS):
            handles += [module.register_forward_pre_hook(before_act), module.register_forward_hook(after_act)]
    size = 0
    try:
        for images in batches:
            if len(calls) >= 2 and size + size // len(calls) > _MOST_BYTES:
                break
            seen = len(calls)
            with suppress(_Seen):
                net(images)
            if len(calls) == seen:
                raise FitError(f"the model does not run {path}: leave it out (--search.exclude {path})")
            size += calls[-1].bytes
    finally:
        for handle in handles:
            handle.remove()
    return calls
