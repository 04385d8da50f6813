"""A torch.fx tracer that stops at layers and touches nothing but a copy of the model; and the lock of all who trace.

`fx.Tracer.trace` patches `nn.Module.__call__`, functions and a flag for the whole process. Other threads then find
their compiled models refused ("Detected that you are using FX to symbolically trace a dynamo-optimized function"), and
patches of two tracers at once are never undone. So this one redirects the modules of a copy instead.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

from timm.layers import DropPath, LayerNorm, LayerNorm2d, get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from depthfuse.merging.merged_blocks import TokenBatchNorm

P = ParamSpec("P")
R = TypeVar("R")

# Layers that stand for one operation although they are written in Python: the plan recognises them whole.
_LEAVES = (DropPath, LayerNorm, LayerNorm2d, TokenBatchNorm)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes through this module (weight and spectral norm do so
    too).
    """
    return bool(
        module._forward_hooks or module._forward_pre_hooks or getattr(module, "parametrizations", None)
    )


# torch.export patches nn.Module for the whole process: while it runs, the attributes of other threads' modules are
# stand-ins of another class. Who captures, or looks at what modules are, does it alone.
one_at_a_time = threading.RLock()


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: wait until no other thread captures or merges a model."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with one_at_a_time:
            return function(*args, **kwargs)

    return call


class LayerTracer(fx.Tracer):
    """Traces down to torch.nn's layers and to timm's leaf modules.

    The first argument of the model is traced; optional ones keep their defaults.
    """

    def __init__(self) -> None:
        super().__init__()
        self._leaves = (*_LEAVES, *get_notrace_modules())
        self._leaf_functions = {id(function) for function in get_notrace_functions()}

    def trace(  # type: ignore[override]
        self, root: nn.Module, concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """The graph of `root`, which is left alone. Raises whatever its code raises on a proxy."""
        own = copy_around_tensors(root)
        self.root, self.graph, self.tensor_attrs = own, fx.Graph(tracer_cls=type(self)), {}
        self.submodule_paths = {module: path for path, module in own.named_modules()}
        for module, path in list(self.submodule_paths.items()):
            leaf = bool(path) and self.is_leaf_module(module, path)
            self._redirect(module, path, leaf)
            if module is not own:  # the whole is no node of its graph
                module.forward = functools.partial(self.call_module, module, module.forward)
        args, named = [], {}
        for index, parameter in enumerate(inspect.signature(root.forward).parameters.values()):
            optional = parameter.default is not parameter.empty and index > 0
            if optional or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            proxy = self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = proxy
            else:
                args.append(proxy)
        self.create_node("output", "output", (self.create_arg(own.forward(*args, **named)),), {})
        self.submodule_paths = None
        return self.graph

    def _redirect(self, module: nn.Module, path: str, leaf: bool) -> None:
        """Let a module of the copy hand out proxies for its parameters, and call leaf functions as one operation."""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                target = f"{path}.{name}" if path else name
                module.__dict__[name] = self.create_proxy("get_attr", target, (), {})
        if leaf:  # its hooks see numbers only
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            return
        methods = {name: f for cls in reversed(type(module).__mro__) for name, f in vars(cls).items()}
        for name, method in methods.items():
            if not isinstance(method, FunctionType):
                continue
            known = method.__globals__
            leaves = {
                n: known[n] for n in method.__code__.co_names if id(known.get(n)) in self._leaf_functions
            }
            if leaves:
                scope = {**known, **{n: self._as_operation(f) for n, f in leaves.items()}}
                twin = FunctionType(method.__code__, scope, name, method.__defaults__, method.__closure__)
                twin.__kwdefaults__ = method.__kwdefaults__
                module.__dict__[name] = MethodType(twin, module)

    def _as_operation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            proxies: list[fx.Proxy] = []
            fx.node.map_aggregate(
                (args, kwargs), lambda value: proxies.append(value) if isinstance(value, fx.Proxy) else None
            )
            if proxies:
                return self.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def call_module(self, m: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, self._leaves) or has_hooks(module):
            return True
        return super().is_leaf_module(module, qualified_name)


def copy_around_tensors(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares all tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
