"""A torch.fx tracer that stops at layers, and is safe beside other threads."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from timm.layers import DropPath, LayerNorm, LayerNorm2d, get_notrace_functions, get_notrace_modules
from torch import fx, nn

from depthfuse.merging.merged_blocks import TokenBatchNorm

# Layers that stand for one operation although they are written in Python: the plan recognises them whole.
_LEAVES = (DropPath, LayerNorm, LayerNorm2d, TokenBatchNorm)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes through this module (weight and spectral norm do so
    too).
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or getattr(module, "parametrizations", None)
    )


# Tracing patches PyTorch for the whole process, and planning watches models by hooks: whoever does so, does it alone.
one_at_a_time = threading.RLock()


class LayerTracer(fx.Tracer):
    """Traces down to torch.nn's layers and to timm's leaf modules; optional arguments keep their defaults."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (*_LEAVES, *get_notrace_modules())
        self._thread = threading.get_ident()

    # torch.fx patches nn.Module for the whole process while it traces: what other threads run is none of its business.

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def trace(self, root, concrete_args=None):
        with one_at_a_time:
            return super().trace(root, concrete_args)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, self._leaves) or has_hooks(module):
            return True
        return super().is_leaf_module(module, qualified_name)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        # A proxy for an optional argument would answer "is not None" wrongly: trace with the default itself.
        parameters = [
            p for p in inspect.signature(root_fn).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]
        for index, parameter in enumerate(parameters[: len(args)]):
            if parameter.default is not inspect.Parameter.empty and isinstance(args[index], fx.Proxy):
                self.graph.erase_node(args[index].node)
                args[index] = parameter.default
        return function, args
