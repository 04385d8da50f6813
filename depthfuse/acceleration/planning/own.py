"""A private copy of a model, in the dtype of its plan: planning runs and casts this one, never the user's."""

from __future__ import annotations

import copy
import functools
import types
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from depthfuse.errors import AccelerationError

# Hooks that compute a layer's weight from other tensors, always the same in evaluation mode.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def own_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy without gradients; its tensors of the model's main dtype are cast to `dtype`, those of others are not.

    Weights that PyTorch's weight norm, spectral norm and pruning compute anew at every call are computed once.

    Raises:
        AccelerationError: the model cannot be copied.
    """
    # What a hook or a mask computed with autograd on, PyTorch does not copy; and TorchScript's copies remember theirs.
    computed = (x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor))
    memo = {id(x): x.detach().clone() for x in computed if not x.is_leaf}
    try:
        with torch.no_grad():
            own: nn.Module = copy.deepcopy(model, memo)
            for module in own.modules():
                for name, value in vars(module).items():
                    module.__dict__[name] = _with_own_closure(value, memo)
    except (TypeError, RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
        raise AccelerationError(f"{type(model).__name__} cannot be copied: {error}") from error
    own.requires_grad_(False)
    for module in own.modules():
        _compute_weights(module)
    return own if dtype is None else cast_main(own, dtype)


def _with_own_closure(value: Any, memo: dict[int, Any]) -> Any:
    """A function whose closure holds the copies of what it held: `copy.deepcopy` takes functions as they are, and who
    wraps a model's forward, or sets a lambda in its place, closes over the model itself.
    """
    if isinstance(value, types.MethodType):
        own = _with_own_closure(value.__func__, memo)
        return value if own is value.__func__ else types.MethodType(own, value.__self__)
    if isinstance(value, functools.partial) and type(value) is functools.partial:
        own = _with_own_closure(value.func, memo)
        return value if own is value.func else functools.partial(own, *value.args, **value.keywords)
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    if id(value) in memo:
        return memo[id(value)]
    held = []
    for cell in value.__closure__:
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            return value
    if not any(isinstance(x, (nn.Module, Tensor, types.MethodType, functools.partial)) for x in held):
        return value
    cells = tuple(types.CellType() for _ in held)
    own = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    own.__kwdefaults__ = value.__kwdefaults__
    own.__dict__.update(value.__dict__)
    memo[id(value)] = own  # one that calls itself has itself in its closure
    for cell, x in zip(cells, held, strict=True):
        cell.cell_contents = _with_own_closure(copy.deepcopy(x, memo), memo)
    return own


def main_dtype(model: nn.Module) -> torch.dtype | None:
    """The floating-point dtype of most of a model's numbers, or None for a model without any."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            numbers[tensor.dtype] += max(tensor.numel(), 1)
    return max(numbers, key=numbers.__getitem__) if numbers else None


def cast_main(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the tensors of the main dtype, in place."""
    main = main_dtype(model)
    if main == dtype:
        return model
    return model._apply(lambda tensor: tensor.to(dtype) if tensor.dtype == main else tensor)


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are shared under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _compute_weights(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if not isinstance(hook, _WEIGHT_HOOKS):
            continue
        hook(module, ())
        name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
        value = getattr(module, name).detach().clone()
        del module._forward_pre_hooks[key]
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        module.__dict__.pop(name, None)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
