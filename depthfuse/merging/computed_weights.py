"""Weights that layers compute from other tensors: parametrisations, weight norm, spectral norm, pruning masks.

PyTorch has two mechanisms. `torch.nn.utils.parametrize` turns a weight into a property, which is always right. The
older weight norm and spectral norm, and pruning, leave a plain tensor in the weight's place and set it anew by a hook
whenever the layer is called: who reads it without a call reads what it was at the last one.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from depthfuse.errors import MergeError

Module = TypeVar("Module", bound=nn.Module)

# They compute a weight from tensors of the same layer, always the same in evaluation mode.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it; a parametrised module is of a class of its own."""
    return parametrize.type_before_parametrizations(module)


def foreign_hook(module: nn.Module) -> str | None:
    """The path of a layer in `module` with a forward hook that does more than compute a weight, or None."""
    for path, layer in module.named_modules():
        before = [h for h in layer._forward_pre_hooks.values() if not isinstance(h, _WEIGHT_HOOKS)]
        if before or layer._forward_hooks:
            return path or "the block itself"
    return None


def has_computed(module: nn.Module) -> bool:
    """Whether a layer in `module` computes a weight from other tensors."""
    return any(
        parametrize.is_parametrized(layer)
        or any(isinstance(hook, _WEIGHT_HOOKS) for hook in layer._forward_pre_hooks.values())
        for layer in module.modules()
    )


def refresh(module: nn.Module) -> None:
    """Set the weights that hooks compute, as calls of their layers would, for those who read them without a call."""
    for layer in module.modules():
        if layer._forward_pre_hooks:
            # The last one first: it computes what the ones before it read, as a mask over a weight norm's direction.
            for hook in reversed(list(layer._forward_pre_hooks.values())):
                if isinstance(hook, _WEIGHT_HOOKS):
                    hook(layer, ())


def in_float64(module: Module) -> Module:
    """Cast in place, with what hooks computed last, which PyTorch leaves behind."""
    module.double()
    refresh(module)
    return module


def private_copy(module: Module) -> Module:
    """A deep copy, also of layers whose weight was computed with a gradient, which PyTorch refuses to copy.

    Raises MergeError for a module that cannot be copied.
    """
    try:
        return copy.deepcopy(module, copies_of_computed(module))
    except (TypeError, RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
        raise MergeError(
            f"{type(module).__name__} cannot be copied ({error}), and the model given is never altered: let it hold "
            "parameters, buffers and plain values, which copy.deepcopy can copy"
        ) from error


def copies_of_computed(module: nn.Module) -> dict[int, Any]:
    """A memo for copy.deepcopy: the copies, without gradient, of what the hooks computed last."""
    computed = [
        layer.__dict__.get(_name(hook))
        for layer in module.modules()
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, _WEIGHT_HOOKS)
    ]
    return {id(value): value.detach().clone() for value in computed if isinstance(value, Tensor)}


@torch.no_grad()
def compute_weights(model: nn.Module) -> None:
    """Turn all computed weights into plain parameters of the value that they have now, in place.

    Not by `parametrize.remove_parametrizations`: it writes to what other layers may share, and deletes the weight from
    a class that a copy shares with the module it was copied from.
    """
    for layer in list(model.modules()):
        # as in `refresh`
        for key, hook in reversed(list(layer._forward_pre_hooks.items())):
            if isinstance(hook, _WEIGHT_HOOKS):
                _compute_hooked(layer, key, hook)
        if parametrize.is_parametrized(layer):
            _compute_parametrised(layer)


def _name(hook: Any) -> str:
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name


def _compute_hooked(layer: nn.Module, key: int, hook: Any) -> None:
    name = _name(hook)
    originals = [p for suffix in ("orig", "g") for p in [layer._parameters.get(f"{name}_{suffix}")]]
    learned = any(p is not None and p.requires_grad for p in originals)
    if isinstance(hook, WeightNorm):
        remove_weight_norm(layer, name)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(layer, name)
    else:
        hook(layer, ())
        value = layer.__dict__.pop(name).detach().clone()
        del layer._forward_pre_hooks[key]
        layer._parameters.pop(f"{name}_orig")
        layer._buffers.pop(f"{name}_mask")
        layer.register_parameter(name, nn.Parameter(value))
    getattr(layer, name).requires_grad_(learned)


def _compute_parametrised(layer: nn.Module) -> None:
    lists = dict(layer.parametrizations.items())
    values = {name: getattr(layer, name).detach().clone() for name in lists}
    layer.__class__ = plain_type(layer)
    del layer.parametrizations
    for name, value in values.items():
        originals = list(lists[name].parameters(recurse=False))
        if originals:
            learned = any(p.requires_grad for p in originals)
            layer.register_parameter(name, nn.Parameter(value, requires_grad=learned))
        else:
            layer.register_buffer(name, value)
